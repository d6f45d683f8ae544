"""The Triton kernels compiled for NVIDIA GPUs, which needs none; a process of its own, without Triton's interpreter.

Prints, as JSON, the bytes of machine code of each kernel in each form.
"""

import itertools
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from library.layers import fused_kernels

GENERATIONS = 75, 90  # compute capability: RTX 20 and H100
FORMATS = "fp32", "bf16", "fp16"
NAMES = "_moments", "_normalise", "_gradient_sums", "_input_gradient", "_geglu", "_geglu_gradient"
OF_MODEL = "x_at", "out_at", "gradient_at", "weight_at", "bias_at"  # the others are in fp32
LARGEST = {"BLOCK": fused_kernels.MAX_BLOCK, "PARTS": fused_kernels.MAX_PARTS}


def machine_code(name: str, dtype: str, generation: int, silu: bool) -> bytes:
    kernel = getattr(fused_kernels, name)
    constants = {key: value for key, value in (LARGEST | {"SILU": silu}).items() if key in kernel.arg_names}
    signature = {argument: type_of(argument, dtype) for argument in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    warps = fused_kernels.MAX_BLOCK // fused_kernels.WARP_SHARE
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": warps}).asm["cubin"]


def type_of(argument: str, dtype: str) -> str:
    """As Triton writes it."""
    if argument.endswith("_at"):
        return f"*{dtype if argument in OF_MODEL else 'fp32'}"
    return "fp32" if argument == "eps" else "i32"


if __name__ == "__main__":
    forms = itertools.product(NAMES, FORMATS, GENERATIONS, (False, True))
    print(json.dumps({" ".join(map(str, form)): len(machine_code(*form)) for form in forms}))
