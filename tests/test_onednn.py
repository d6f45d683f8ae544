"""Frozen layers by way of oneDNN: the numbers of PyTorch's own, up to rounding, with adapters and without."""

import copy
import platform

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers import onednn
from library.layers.frozen import input_gradient_of, output_of
from library.training.on_cpu import keep_freed_memory
from networks import lora
from tests import tiny
from tests.conftest import RUNS_SLOW_TESTS
from train_network import train

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="for x86 processors with AVX2"
)
LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (2, 9, 64)),
    "linear without bias": (lambda: nn.Linear(64, 32, bias=False), (64,)),
    "1x1 convolution": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 9, 8)),
    "convolution of few pixels": (lambda: nn.Conv2d(16, 64, 3, padding=1), (2, 16, 5, 4)),
    "convolution of many pixels": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 8)),
    "convolution without bias": (lambda: nn.Conv2d(16, 64, (3, 1), padding=(1, 0), bias=False), (1, 16, 5, 4)),
    "strided, odd size": (lambda: nn.Conv2d(16, 64, 3, stride=2, padding=1), (2, 16, 9, 7)),
    "strided, even size": (lambda: nn.Conv2d(16, 64, 3, stride=(2, 1), padding=1), (1, 16, 8, 6)),
}
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
NUM_STEPS = 50 if RUNS_SLOW_TESTS else 20


def converted(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).requires_grad_(False)
    onednn.compute_with_onednn(model)
    return model


@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("memory", ["own", "of a file", "part of another"])
def test_weights_get_their_channels_last_in_their_own_memory_and_leave_that_of_others_alone(kernel, memory, tmp_path):
    wanted = torch.randn(37, 8, *kernel)
    if memory == "of a file":
        save_file({"weight": wanted}, tmp_path / "file.safetensors")
        weight = load_file(tmp_path / "file.safetensors")["weight"]
    else:
        weight = wanted.clone() if memory == "own" else torch.stack([wanted, wanted])[1]
    found = onednn.with_channels_last(weight)
    assert torch.equal(found, wanted) and found.is_contiguous(memory_format=torch.channels_last)
    if memory == "own":
        assert found.data_ptr() == weight.data_ptr()
    else:
        assert torch.equal(weight, wanted)


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_input_gradient_are_those_of_the_plain_layer(kind, dtype, channels_last):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make().to(dtype).requires_grad_(False)
    ours = converted(nn.Sequential(plain))[0]
    assert type(ours) is not type(plain) or (dtype, type(plain)) == (torch.bfloat16, nn.Linear)
    x = torch.randn(shape).to(dtype)
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    given, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    output, wanted = ours(given), copy.deepcopy(plain).double()(exact)
    assert output.dtype == dtype and output.shape == wanted.shape
    gradient = torch.randn(output.shape).to(dtype)
    output.backward(gradient)
    wanted.backward(gradient.double())
    assert relative(output, wanted) < LIMITS[dtype] and relative(given.grad, exact.grad) < LIMITS[dtype]
    assert torch.equal(output_of(ours, x), output)
    assert torch.equal(input_gradient_of(ours, gradient, x.shape), given.grad)
    assert torch.equal(ours.weight, plain.weight)


def test_under_autocast_layers_compute_in_the_format_of_their_weights():
    layer = converted(nn.Sequential(nn.Conv2d(16, 64, 3, padding=1).bfloat16()))[0]
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_layers_that_are_trained_adapted_or_unusual_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4), nn.Linear(4, 4).double())
    model[1:].requires_grad_(False)
    model[2].forward = lambda x: x
    onednn.compute_with_onednn(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Conv2d, nn.Linear, nn.Linear]


def test_where_numbers_differ_the_layers_stay_plain_with_a_line(monkeypatch, caplog):
    monkeypatch.setattr(onednn.Conv2d, "output", lambda self, x: 1.001 * self._conv_forward(x, self.weight, self.bias))
    unet, state = tiny.models().unet, torch.get_rng_state()
    model = converted(unet)
    assert "oneDNN's numbers for Conv2d" in caplog.text
    assert not any(isinstance(layer, onednn.FrozenLayer) for layer in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["linear", "1x1 convolution", "convolution of few pixels"])
def test_gradients_go_through_a_layer_whose_adapter_is_dropped(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make().requires_grad_(False)
    ours = converted(nn.Sequential(plain))[0]
    lora.create_network([AdapterTarget("layer", ours, "unet")], 2, 1, module_dropout="1").train().apply_to()
    x, exact = (torch.ones(shape).requires_grad_() for _ in range(2))
    ours(x).sum().backward()
    plain(exact).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True, "network_args": ["conv_dim=2"]}])
def test_steps_are_those_of_plain_layers(arguments, model_file, pictures, tmp_path, caplog):
    """Adapters on text encoder and U-Net; SGD, since Adam divides rounding by rounding where nothing is learnt."""
    common = dict(max_train_epochs=None, max_train_steps=NUM_STEPS, optimizer_type="SGD", learning_rate=0.1) | arguments
    train(tiny.arguments(model_file, pictures, tmp_path / "plain", no_onednn=True, **common))
    train(tiny.arguments(model_file, pictures, tmp_path / "ours", **common))
    assert "slower" not in caplog.text
    ours, wanted = (load_file(tmp_path / name / "lora.safetensors") for name in ("ours", "plain"))
    moved = [name for name in wanted if "lora_up" in name and wanted[name].any()]
    assert moved and any(not torch.equal(ours[name], wanted[name]) for name in moved)
    together = [torch.cat([weights[name].flatten() for name in moved]) for weights in (ours, wanted)]
    assert relative(*together) < 1e-5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_what_a_step_frees_is_not_mapped_anew_by_the_next():
    resource = pytest.importorskip("resource")
    keep_freed_memory()
    faults = []
    for _ in range(10):  # the first ones find their place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(50 * 2**20, dtype=torch.uint8).fill_(1)  # 12,800 pages, more than glibc's threshold takes
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 1000, faults
