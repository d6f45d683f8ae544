#!/usr/bin/env bash
# Make .venv where it is missing and install into it; arguments go to tools/install.py (--dev, --xformers, ...).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PYTHONUTF8=1

find_python() {
    local name
    for name in python3 python python3.12 python3.11 python3.13 python3.10; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "Athanor needs Python 3.10, 3.11, 3.12 or 3.13, and none was found: install one (https://www.python.org/downloads/)." >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    # Debian and Ubuntu leave ensurepip out of their Python; asked first, since venv would leave half a folder behind.
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "This Python cannot make virtual environments: install its venv package (Debian, Ubuntu: sudo apt install python3-venv)." >&2
        exit 1
    fi
    echo "Making .venv with $("$python" --version)."
    "$python" -m venv .venv
fi
exec .venv/bin/python tools/install.py "$@"
