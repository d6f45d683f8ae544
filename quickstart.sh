#!/usr/bin/env bash
# From a fresh checkout to a trained LoRA: environment, packages, a small training run, and where its files are.
# Arguments go to train_network.py, for example: ./quickstart.sh --max_train_epochs 5
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

bash tools/install.sh

# Everything the quickstart needs is in the checkout.
export PYTHONUTF8=1 HF_HUB_OFFLINE=1

# So small a model gains nothing from more than four threads.
threads=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=${OMP_NUM_THREADS:-$((threads < 4 ? threads : 4))}
lora=output/quickstart/yabin.safetensors
picture=output/quickstart/before_after.png
# All flags that accelerate would otherwise ask for, or warn about, where `accelerate config` was never run;
# --quiet leaves out its own traceback below that of a failed script.
launch=(--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
    --num_cpu_threads_per_process "$threads")
[[ "$(nvidia-smi -L 2>/dev/null || true)" == GPU* ]] || launch+=(--cpu)

if [ $# -eq 0 ] && [ -f "$lora" ] && [ -f "$picture" ]; then
    echo "Trained already; to train again, remove output/quickstart or give a flag such as --seed 2."
else
    # `accelerate launch`, as a module: unlike .venv/bin/accelerate this still works after the checkout was moved.
    .venv/bin/python -m accelerate.commands.launch "${launch[@]}" \
        train_network.py --config_file config_examples/quickstart.toml "$@"
fi

status=0
report() {
    if [ -f "$2" ]; then
        echo "$1: $2"
    else
        echo "$1 is missing: $2 was not written." >&2
        status=1
    fi
}
echo
report "The LoRA" "$lora"
report "Pictures before and after" "$picture"
exit "$status"
