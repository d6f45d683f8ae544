# Dot-sourced by train.ps1 and train_by_toml.ps1: makes flags of their variables and runs train_network.py in .venv.

$arguments = @()

function Stop-WithError($Message) {
    [Console]::Error.WriteLine("error: $Message")
    exit 2
}

# The flag with its value or values; nothing where they are empty.
function Add-Option($Flag, $Value) {
    if ("$Value" -eq "") { return }
    # A \ at the end of a value with spaces would escape the quote that Windows PowerShell puts behind it.
    $words = @($Value | ForEach-Object { "$_" -replace '(?<=[^:\\])\\+$', '' })
    $script:arguments += @("--$Flag") + $words
}

# The flag where the value is 1.
function Add-Switch($Flag, $Value) {
    if ("$Value" -in "1", "true") {
        $script:arguments += "--$Flag"
    } elseif ("$Value" -notin "0", "false", "") {
        Stop-WithError "--$Flag must be 1 or 0, got $Value"
    }
}

# Train with what was collected and the flags given, which go first.
function Start-Training($More) {
    $python = Join-Path $PSScriptRoot "..\.venv\Scripts\python.exe"
    if (-not (Test-Path -LiteralPath $python)) {
        Stop-WithError "there is no .venv: make it with tools\install.ps1 (or quickstart.bat)"
    }
    $command = @()
    # One process runs without accelerate, which would turn every exit code into 1 (2 is a mistake in what was given).
    if ("$multi_gpu" -in "1", "true") {
        $threads = if ($env:OMP_NUM_THREADS) { $env:OMP_NUM_THREADS } else { 4 }
        $command = @("-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", $num_processes,
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--num_cpu_threads_per_process", $threads)
    } elseif ("$multi_gpu" -notin "0", "false", "") {
        Stop-WithError "multi_gpu must be 1 or 0, got $multi_gpu"
    }
    if (-not $env:PYTHONUTF8) { $env:PYTHONUTF8 = "1" }
    if (-not $env:HF_HUB_OFFLINE) { $env:HF_HUB_OFFLINE = "1" }
    # PowerShell reads 512,512 on its command line as a list of two.
    $More = @($More | ForEach-Object { $_ -join "," })
    $visible = $env:CUDA_VISIBLE_DEVICES
    Push-Location -LiteralPath (Split-Path -Parent $PSScriptRoot)
    try {
        if ("$gpu_ids" -ne "") { $env:CUDA_VISIBLE_DEVICES = "$gpu_ids" }
        & $python @command train_network.py @arguments @More
    } finally {
        Pop-Location
        $env:CUDA_VISIBLE_DEVICES = $visible
    }
}
