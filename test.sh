#!/usr/bin/env bash
# Run the tests, offline, in .venv (made where missing). Arguments go to pytest; --all runs the slow tests too.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

arguments=()
for argument in "$@"; do
    case $argument in
        --all) export ATHANOR_SLOW_TESTS=1 ;;
        *) arguments+=("$argument") ;;
    esac
done

bash tools/install.sh --dev

# An empty cache shows that nothing is taken from, or left to, the hub.
HF_HOME=$(mktemp -d)
trap 'rm -rf -- "$HF_HOME"' EXIT
# One thread: toy models gain nothing from more, and lose tenfold where another job shares the cores.
export HF_HOME HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONUTF8=1

# The odd expansion is for macOS's bash 3.2, to which an empty array is an unset variable.
.venv/bin/python -m pytest ${arguments[@]+"${arguments[@]}"}
