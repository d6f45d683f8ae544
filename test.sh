#!/usr/bin/env bash
# Run the tests, offline, in .venv (made where missing), in as many processes as there are cores, at most four.
# --all runs the slow tests too. Other arguments go to pytest, in one process: -n auto asks for more.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

arguments=()
for argument in "$@"; do
    case $argument in
        --all) export ATHANOR_SLOW_TESTS=1 ;;
        *) arguments+=("$argument") ;;
    esac
done
if [ ${#arguments[@]} = 0 ]; then
    arguments=(-n auto --dist worksteal)
fi

bash tools/install.sh --dev

# An empty cache shows that nothing is taken from, or left to, the hub.
HF_HOME=$(mktemp -d)
trap 'rm -rf -- "$HF_HOME"' EXIT
# One thread: toy models gain nothing from more, and lose tenfold where another job shares the cores.
export HF_HOME HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONUTF8=1

.venv/bin/python -m pytest "${arguments[@]}"
