# From a fresh checkout to a trained LoRA: environment, packages, a small training run, and where its files are.
# Arguments go to train_network.py, for example: .\quickstart.ps1 --max_train_epochs 5
& (Join-Path $PSScriptRoot "tools\install.ps1")
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }

# Everything the quickstart needs is in the checkout.
$env:PYTHONUTF8 = "1"
$env:HF_HUB_OFFLINE = "1"

# So small a model gains nothing from more than four threads.
$threads = [Math]::Min([Environment]::ProcessorCount, 4)
if ($env:OMP_NUM_THREADS) { $threads = $env:OMP_NUM_THREADS }
# All flags that accelerate would otherwise ask for, or warn about, where "accelerate config" was never run;
# --quiet leaves out its own traceback below that of a failed script.
$launch = @("--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--num_cpu_threads_per_process", $threads)
$devices = ""
if (Get-Command nvidia-smi -ErrorAction SilentlyContinue) { $devices = "$(& nvidia-smi -L 2>$null)" }
if (-not $devices.StartsWith("GPU ")) { $launch += "--cpu" }

Push-Location -LiteralPath $PSScriptRoot
$lora = "output\quickstart\yabin.safetensors"
$picture = "output\quickstart\before_after.png"
try {
    if ($args.Count -eq 0 -and (Test-Path -LiteralPath $lora) -and (Test-Path -LiteralPath $picture)) {
        Write-Host "Trained already; to train again, remove output\quickstart or give a flag such as --seed 2."
        $status = 0
    } else {
        # "accelerate launch", as a module: unlike accelerate.exe this still works after the checkout was moved.
        & ".venv\Scripts\python.exe" -m accelerate.commands.launch @launch `
            train_network.py --config_file config_examples/quickstart.toml @args
        $status = $LASTEXITCODE
    }
    if ($status -eq 0) {
        Write-Host ""
        $results = [ordered]@{
            "The LoRA" = $lora
            "Pictures before and after" = $picture
        }
        foreach ($what in $results.Keys) {
            if (Test-Path -LiteralPath $results[$what]) {
                Write-Host "${what}: $($results[$what])"
            } else {
                Write-Host "$what is missing: $($results[$what]) was not written."
                $status = 1
            }
        }
    }
} finally {
    Pop-Location
}
exit $status
