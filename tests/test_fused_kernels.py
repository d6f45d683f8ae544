"""The Triton kernels compute what PyTorch computes, and without a GPU a line says that they are not used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from library.training.fused import TOLERANCES, largest_difference, working_kernels
from tests import tiny
from train_network import train


def said_by(child: str, *arguments: str) -> dict:
    """What a script beside this file prints last, as JSON."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    command = sys.executable, str(Path(__file__).with_name(child)), *arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def errors_of(*arguments: str) -> dict[str, dict[str, float]]:
    """How far each result is from PyTorch's, in parts of the largest number."""
    return said_by("fused_kernels_child.py", *arguments)


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    return errors_of()


def too_far(errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    in_fp32 = {name: found for name, found in errors.items() if not name.startswith("torch.")}
    return {name: found for name, found in in_fp32.items() if not all(error <= 1e-5 for error in found.values())}


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


def test_they_compile_for_nvidia_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = said_by("compiled_kernels_child.py")
    assert {name.split()[0] for name in sizes} >= {"_normalise", "_input_gradient", "_geglu", "_geglu_gradient"}
    assert all(sizes.values())


def test_without_a_gpu_a_line_says_that_they_are_not_used(tiny_file, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", fused_kernels=True))
    assert capsys.readouterr().err.count("--fused_kernels is not used, because there is no NVIDIA GPU") == 1
    assert (tmp_path / "out" / "lora.safetensors").exists()


class PyTorchs:
    """PyTorch's operations where kernels are expected, in fp32."""

    def group_norm(self, x, weight, bias, groups, eps, silu, dtype):
        normal, mean, rstd = torch.native_group_norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)
        return F.silu(normal), mean, rstd

    def group_norm_gradient(self, gradient, x, mean, rstd, weight, bias, silu):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.silu(F.group_norm(x, mean.shape[1], weight, bias)), x, gradient)[0]

    def geglu(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def geglu_gradient(self, gradient, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.geglu(x), x, gradient)[0]


@pytest.mark.parametrize("wrong", [float("nan"), 1.001])
@pytest.mark.parametrize("name", ["group_norm", "group_norm_gradient", "geglu", "geglu_gradient"])
def test_the_check_at_the_start_sees_wrong_numbers(name, wrong):
    kernels, limit = PyTorchs(), TOLERANCES[torch.float32]
    assert largest_difference(kernels, torch.device("cpu"), torch.float32) <= limit
    right = getattr(kernels, name)

    def spoiled(*inputs):
        given = right(*inputs)
        return (given[0] * wrong, *given[1:]) if isinstance(given, tuple) else given * wrong

    setattr(kernels, name, spoiled)
    assert not largest_difference(kernels, torch.device("cpu"), torch.float32) <= limit


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
