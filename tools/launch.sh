# Sourced by train.sh and train_by_toml.sh: makes flags of their variables and runs train_network.py in .venv.

arguments=()

fail() {
    echo "error: $1" >&2
    exit 2
}

# option FLAG VALUE...: the flag with its value or values; nothing where they are empty.
option() {
    [ -z "${2-}" ] || arguments+=("--$1" "${@:2}")
}

# switch FLAG VALUE: the flag where the value is 1.
switch() {
    case $2 in
        1 | true) arguments+=("--$1") ;;
        0 | false | "") ;;
        *) fail "--$1 must be 1 or 0, got $2" ;;
    esac
}

# launch [FLAG...]: train with what was collected and the flags given, which go first. Does not return.
launch() {
    [ -x .venv/bin/python ] || fail "there is no .venv here: make it with bash tools/install.sh (or bash quickstart.sh)"
    local command=(.venv/bin/python)
    # One process runs without accelerate, which would turn every exit code into 1 (2 is a mistake in what was given).
    case $multi_gpu in
        1 | true)
            command+=(-m accelerate.commands.launch --quiet --multi_gpu --num_processes "$num_processes"
                --num_machines 1 --mixed_precision no --dynamo_backend no
                --num_cpu_threads_per_process "${OMP_NUM_THREADS:-4}")
            ;;
        0 | false | "") ;;
        *) fail "multi_gpu must be 1 or 0, got $multi_gpu" ;;
    esac
    [ -z "$gpu_ids" ] || export CUDA_VISIBLE_DEVICES=$gpu_ids
    export PYTHONUTF8=${PYTHONUTF8:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    exec "${command[@]}" train_network.py "${arguments[@]}" "$@"
}
