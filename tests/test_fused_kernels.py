"""The Triton kernels compute what PyTorch computes, and without a GPU a line says that they are not used."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.layers.unet_blocks import keep_little
from library.options.groups import TrainNetworkOptions
from library.training.fused import TOLERANCES, fuse, largest_difference, working_kernels
from tests import tiny

CHILD = Path(__file__).with_name("fused_kernels_child.py")


def errors_of(*arguments: str) -> dict[str, dict[str, float]]:
    """How far each result is from PyTorch's, in parts of the largest number."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    done = subprocess.run([sys.executable, str(CHILD), *arguments], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    return errors_of()


def too_far(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    in_fp32 = {name: found for name, found in errors.items() if not name.startswith("torch.")}
    return {name: found for name, found in in_fp32.items() if not max(found.values()) <= 1e-5}


def test_kernels_compute_what_pytorch_computes(errors):
    assert {"norm", "geglu", "mid"} <= {name.split()[0] for name in errors}
    assert too_far(errors) == {}


@pytest.mark.slow
def test_whole_models_compute_the_same_with_kernels():
    errors = errors_of("--slow")
    assert {"unet sd1", "unet sdxl"} <= errors.keys() and too_far(errors) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_they_differ_by_rounding(errors, dtype):
    assert errors[str(dtype)]["worst"] <= TOLERANCES[dtype]


def test_without_a_gpu_a_line_says_that_they_are_not_used(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    unet = copy.deepcopy(tiny.models("sd1").unet).requires_grad_(False)
    keep_little(unet)
    fuse(unet, TrainNetworkOptions(fused_kernels=True), torch.device("cpu"))
    assert [record.getMessage() for record in caplog.records] == [
        "--fused_kernels is not used, because there is no NVIDIA GPU"
    ]
    assert not any(getattr(module, "kernels", None) for module in unet.modules())


def test_kernels_that_compute_something_else_are_not_used(monkeypatch):

    monkeypatch.setattr("library.training.fused.largest_difference", lambda *_: float("nan"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="Triton is for Linux")
    kernels, problem = working_kernels(torch.device("cpu"))
    assert kernels is None and "compute other numbers than PyTorch here" in problem


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_on_a_gpu_they_compute_what_pytorch_computes(dtype):
    kernels, problem = working_kernels(torch.device("cuda"))
    assert kernels, problem
    assert largest_difference(kernels, torch.device("cuda"), dtype) <= TOLERANCES[dtype]
