# Make .venv where it is missing and install into it; arguments go to tools\install.py (--dev, --xformers, ...).
$root = Split-Path -Parent $PSScriptRoot
$venvPython = Join-Path $root ".venv\Scripts\python.exe"
$env:PYTHONUTF8 = "1"

function Find-Python {
    # "py" is the launcher of python.org's installer. "python" may be the Store's stand-in, which only prints
    # an advertisement, so each candidate is run before it is believed.
    foreach ($candidate in "py -3.12", "py -3.11", "py -3.13", "py -3.10", "python", "python3") {
        $words = @($candidate -split " ")
        $options = @($words | Select-Object -Skip 1)
        if (-not (Get-Command $words[0] -ErrorAction SilentlyContinue)) { continue }
        & $words[0] @options -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" 2>$null | Out-Null
        if ($LASTEXITCODE -eq 0) { return $candidate }
    }
}

if (-not (Test-Path -LiteralPath $venvPython)) {
    $found = Find-Python
    if (-not $found) {
        Write-Host "Athanor needs Python 3.10, 3.11, 3.12 or 3.13, and none was found: install one from https://www.python.org/downloads/ (3.12 is a good choice)."
        exit 1
    }
    $words = @($found -split " ")
    $options = @($words | Select-Object -Skip 1)
    Write-Host "Making .venv with $found."
    & $words[0] @options -m venv (Join-Path $root ".venv")
    if ($LASTEXITCODE -ne 0) {
        Write-Host "This Python could not make a virtual environment: install Python from https://www.python.org/downloads/."
        exit 1
    }
}
& $venvPython (Join-Path $PSScriptRoot "install.py") @args
exit $LASTEXITCODE
