#!/usr/bin/env bash
# Runs a script as if there were a GPU; see device.py. PYTHON names an interpreter whose PyTorch is built for CUDA.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"] + "/triton/backends/nvidia/include")')
if [ ! -f "$headers/cuda_runtime_api.h" ]; then
    echo "$python has no PyTorch that is built for CUDA, as \`pip install torch\` has it on Linux" >&2
    exit 2
fi
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
gcc -shared -fPIC -O1 -I "$headers" -o "$built/libcuda.so.1" "$here/runtime.c"
LD_PRELOAD="$built/libcuda.so.1" LD_LIBRARY_PATH="$built" OMP_NUM_THREADS=1 "$python" "$here/device.py" "$@"
