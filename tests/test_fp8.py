"""--fp8_base: what is stored is small, what is computed is what the rounded weights give."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.layers.fp8 import hold_in_fp8
from tests import tiny
from train_network import train

LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (2, 9, 64)),
    "linear without bias": (lambda: nn.Linear(64, 32, bias=False), (2, 9, 64)),
    "convolution": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 8)),
    "1x1 convolution": (lambda: nn.Conv2d(16, 32, 1), (2, 16, 9, 8)),
}


def rounded(weight: Tensor) -> Tensor:
    """To 4 significant bits: what a scaled e4m3 keeps of all but the very smallest weights."""
    mantissa, exponent = torch.frexp(weight.double())
    return torch.ldexp((mantissa * 16).round(), exponent - 4).to(weight.dtype)


def held(layer: nn.Module) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    hold_in_fp8(model)
    return model[0]


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=layer.weight.dtype == torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_held_layer_and_its_gradient_are_those_of_the_rounded_weight(kind, dtype):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().to(dtype).requires_grad_(False)
    fp8 = held(layer)
    magnitudes = layer.weight.abs() > layer.weight.abs().max() / 2**12  # below it fp8 has fewer bits left
    assert torch.equal(fp8.weight[magnitudes], rounded(layer.weight)[magnitudes])
    layer.weight.copy_(fp8.weight)
    x = torch.randn(shape)
    for ours, wanted in zip(output_and_gradient(fp8, x), output_and_gradient(layer, x), strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 1000.0])
def test_weights_of_any_size_keep_4_significant_bits(size):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight.normal_(std=size)
    assert (held(layer).weight - layer.weight).norm() < 0.03 * layer.weight.norm()
    layer.weight.zero_()
    assert not held(layer).weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-28, 1.0, 2.0**7])
def test_every_number_is_read_as_pytorch_reads_it(scale, dtype):
    """On a processor too, where the bits are moved instead; all but the two that are no numbers."""
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    stored = stored[stored.float().isfinite()].view(-1, 2)
    layer = held(nn.Linear(2, 127).to(dtype))
    layer.stored, layer.scale = nn.Parameter(stored, requires_grad=False), scale
    assert torch.equal(layer.weight, stored.to(dtype) * scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_stays_broken(bad):
    layer = nn.Linear(64, 64).requires_grad_(False)
    layer.weight[3, 4] = bad
    assert not held(layer)(torch.ones(1, 64)).isfinite().all()


def weights_kept(unet) -> list[Tensor]:
    """What a forward pass keeps for the backward pass of the size of a large weight."""
    sizes = {p.numel() for p in unet.parameters() if p.ndim > 1 and p.numel() > 10_000}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 77, 32, requires_grad=True)).sample.sum()
    return [x for x in kept if x.numel() in sizes and x.shape[0] != 1]


def test_no_converted_weight_lives_until_the_backward_pass():
    unet = copy.deepcopy(tiny.models().unet).requires_grad_(False)
    num_bytes = sum(p.numel() * p.element_size() for p in unet.parameters())
    assert weights_kept(unet)
    hold_in_fp8(unet)
    assert sum(p.numel() * p.element_size() for p in unet.parameters()) < 0.27 * num_bytes
    assert not weights_kept(unet)


def rounded_file(source, target, prefixes):
    """The checkpoint with the weights of Linear layers and convolutions of these parts as fp8 holds them."""
    weights = load_file(source)
    for name, value in weights.items():
        is_matrix = name.endswith((".weight", ".in_proj_weight", ".text_projection")) and value.ndim > 1
        if name.startswith(prefixes) and is_matrix and "embedding" not in name:
            layers = [nn.Linear(1, 1) for _ in range(3 if name.endswith(".in_proj_weight") else 1)]
            for layer, part in zip(layers, value.chunk(len(layers)), strict=True):
                layer.weight = nn.Parameter(part, requires_grad=False)
            weights[name] = torch.cat([held(layer).weight for layer in layers])
    save_file(weights, target)
    return target


UNET, TEXTS = "model.diffusion_model.", ("cond_stage_model.", "conditioner.embedders.")
PARTS = {"fp8_base": (UNET, *TEXTS), "fp8_base_unet": (UNET,)}


@pytest.mark.parametrize("flag", PARTS)
def test_training_is_that_of_a_checkpoint_with_rounded_weights(flag, model_file, pictures, tmp_path):
    """Merging, checkpointing, previews and the text encoder's own network included."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    common = dict(
        max_train_epochs=None, max_train_steps=3, gradient_checkpointing=True, optimizer_type="SGD", learning_rate=1,
        sample_prompts=prompts, before_after=True, network_args=["conv_dim=2"],
    )  # fmt: skip
    rounded_model = rounded_file(model_file, tmp_path / "rounded.safetensors", PARTS[flag])
    train(tiny.arguments(model_file, pictures, tmp_path / "fp8", **common, **{flag: True}))
    train(tiny.arguments(rounded_model, pictures, tmp_path / "plain", **common))
    ours, wanted = (load_file(tmp_path / name / "lora.safetensors") for name in ("fp8", "plain"))
    moved = [name for name in wanted if "lora_up" in name and wanted[name].any()]
    assert {name.split("_")[1] for name in moved} == {name.split("_")[1] for name in wanted}
    for name in moved:
        assert (ours[name] - wanted[name]).norm() < 1e-3 * wanted[name].norm() + 1e-7, name
    sheets = [np.asarray(Image.open(tmp_path / name / "before_after.png"), dtype=int) for name in ("fp8", "plain")]
    assert abs(sheets[0] - sheets[1]).max() <= 1
