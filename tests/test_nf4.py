"""--base_quantization nf4: QLoRA's 4 bits a weight, against bitsandbytes and a search for the nearest number."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import NF4, has_kernels, hold_in_nf4, packed, unpacked, unpacked_by_bitsandbytes
from networks.lora import create_network
from tests import tiny
from train_network import train

LAYERS = {
    "linear": (lambda: nn.Linear(64, 320), (2, 9, 64)),
    "linear without bias": (lambda: nn.Linear(64, 32, bias=False), (2, 9, 64)),
    "convolution": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 8)),
    "1x1 convolution": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 9, 8)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def held(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    hold_in_nf4(model)
    return model[0]


def nearest(weight: Tensor) -> Tensor:
    """What each weight becomes, by its distance from all 16 numbers; with the blocks' own scales."""
    blocks = weight.double().view(-1, 64)
    peaks = blocks.abs().amax(1, keepdim=True)
    numbers = torch.tensor(NF4, dtype=torch.float64)
    return (numbers[(blocks[..., None] / peaks[..., None] - numbers).abs().argmin(-1)] * peaks).view_as(weight)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_bitsandbytes", [True, False])
def test_a_held_layer_and_its_gradient_are_those_of_the_nearest_numbers(by_bitsandbytes, kind, dtype, monkeypatch):
    if by_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("library.layers.nf4.has_kernels", lambda device: by_bitsandbytes)
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().to(dtype).requires_grad_(False)
    nf4, wanted = held(layer), nearest(layer.weight)
    tolerance = {torch.float32: 0.002, torch.bfloat16: 0.006}[dtype]  # the scales are in 8 bits themselves
    assert (nf4.weight.double() - wanted).norm() < tolerance * wanted.norm()
    layer.weight.copy_(nf4.weight)
    x = torch.randn(shape, dtype=dtype)
    results = []
    for each in (nf4, layer):
        given = x.clone().requires_grad_()
        output = each(given)
        output.float().square().sum().backward()
        results.append((output.detach(), given.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)


def test_bitsandbytes_unpacks_what_is_packed_here_and_rounds_no_better():
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    weight = torch.randn(320, 640)
    peaks = weight.view(-1, 64).abs().amax(1)
    ours, theirs = (unpack(packed(weight).stored, peaks, torch.float32) for unpack in UNPACKS)
    torch.testing.assert_close(ours, theirs)
    state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    their_error = (functional.dequantize_4bit(*state) - weight).norm()
    assert (held(linear_of(weight)).weight - weight).norm() < 1.001 * their_error


UNPACKS = unpacked, unpacked_by_bitsandbytes


def test_bitsandbytes_is_used_where_it_unpacks_right(monkeypatch):
    pytest.importorskip("bitsandbytes")
    device = torch.device("cpu")
    assert has_kernels.__wrapped__(device)
    assert not has_kernels.__wrapped__(torch.device("meta"))
    monkeypatch.setattr("library.layers.nf4.unpacked_by_bitsandbytes", lambda *given: unpacked(*given) + 1)
    assert not has_kernels.__wrapped__(device)


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("size", [1e-6, 0.01, 1000.0])
def test_weights_of_any_size_and_zeros(size):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight.normal_(std=size)
    assert (held(layer).weight - layer.weight).norm() < 0.1 * layer.weight.norm()
    layer.weight.zero_()
    assert not held(layer).weight.any()


def test_a_large_layer_takes_little_more_than_4_bits_and_layers_of_few_channels_stay():
    layer = held(nn.Linear(640, 640, bias=False))
    assert sum(value.nbytes for value in layer.parameters()) < 4.14 / 8 * 640 * 640
    assert {type(held(nn.Conv2d(*channels, 3))) for channels in ((4, 32), (32, 4))} == {nn.Conv2d}


@layers
@pytest.mark.parametrize("hold", [hold_in_fp8, hold_in_int8, hold_in_nf4])
def test_adapters_on_what_is_held_train_and_merge_as_they_compute(hold, kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    (layer,) = model = nn.Sequential(make()).requires_grad_(False)
    hold(model)
    network = create_network([AdapterTarget("lora_unet_layer", layer, "unet")], 4, 2, conv_dim="4")
    nn.init.normal_(next(iter(network.adapters())).lora_up.weight)
    network.apply_to()
    x = torch.randn(shape, requires_grad=True)
    trained = layer(x)
    trained.square().sum().backward()
    assert x.grad.any() and all(parameter.grad.any() for parameter in network.parameters())
    network.remove()
    network.merge()
    error = (layer(x) - trained).norm() / trained.norm()
    assert error < (0.02 if hold is hold_in_int8 else 1e-5)  # whose activations are rounded too until it is merged


def test_a_run_goes_on_where_it_stopped_and_merges_what_lies_below(tiny_file, pictures, tmp_path):
    words = dict(
        base_quantization="nf4", max_train_epochs=None, network_args=["conv_dim=2"], gradient_checkpointing=True
    )  # fmt: skip
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", max_train_steps=4, **words))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "half", max_train_steps=2, save_state=True, **words))
    state = tmp_path / "half" / "lora-state"
    train(tiny.arguments(tiny_file, pictures, tmp_path / "rest", max_train_steps=4, resume=state, **words))
    whole, rest = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())
    assert any(value.any() for name, value in whole.items() if "lora_up" in name)


@pytest.mark.parametrize(
    ("hold", "low", "high"), [(hold_in_int8, 0.009, 0.015), (hold_in_fp8, 0.024, 0.03), (hold_in_nf4, 0.085, 0.1)]
)
def test_the_error_of_a_wide_layer_is_as_documented(hold, low, high):
    torch.manual_seed(0)
    plain = nn.Linear(640, 1280).requires_grad_(False)
    plain.weight.normal_(std=640**-0.5)
    x = torch.randn(64, 640)
    (layer,) = model = nn.Sequential(copy.deepcopy(plain).bfloat16())
    hold(model)
    assert low < (layer(x.bfloat16()) - plain(x)).norm() / plain(x).norm() < high
