@echo off
rem Windows runs no PowerShell script on a double click; this starts train.ps1 for it, which is the file to edit.
powershell -NoProfile -ExecutionPolicy Bypass -File "%~dp0train.ps1" %*
set status=%ERRORLEVEL%
rem A double click opens a window that closes at the end: keep it until the result was read.
pause
exit /b %status%
