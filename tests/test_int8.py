"""--base_quantization int8: products of int8 matrices, close to those of the weights that are rounded."""

import copy

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.layers.int8 import hold_in_int8
from tests import tiny
from train_network import train


def output_and_gradient(layer: nn.Module, x: Tensor, of_output: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    result = layer(x)
    result.backward(of_output)
    return result.detach(), x.grad


@pytest.mark.parametrize("num_tokens", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_plain_layer_within_the_rounding(dtype, num_tokens):
    torch.manual_seed(0)
    plain = nn.Linear(320, 1280).to(dtype).requires_grad_(False)
    plain.weight.mul_(torch.logspace(-3, 1, 1280)[:, None])  # outputs of very different sizes
    (held,) = model = nn.Sequential(copy.deepcopy(plain))
    hold_in_int8(model)
    assert held.stored.dtype == torch.int8
    x, of_output = (torch.randn(2, num_tokens // 2, size, dtype=dtype) for size in (320, 1280))
    for ours, wanted in zip(
        output_and_gradient(held, x, of_output), output_and_gradient(plain, x, of_output), strict=True
    ):
        assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
        assert 1e-4 < (ours - wanted).norm() / wanted.norm() < 0.02
    error = (held.weight.float() - plain.weight.float()).abs().amax(1)
    assert (error <= 0.51 / 127 * plain.weight.float().abs().amax(1) + (dtype != torch.float32) * error.max()).all()


def test_zeros_and_layers_of_other_sizes():
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(16, 16)).requires_grad_(False)
    model[1].weight.zero_()
    hold_in_int8(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[1](torch.zeros(32, 16)), model[1].bias.expand(32, 16))


def test_a_device_without_the_product_is_found_before_the_model_is_loaded(tiny_file, pictures, tmp_path, monkeypatch):
    def missing(*matrices):
        raise NotImplementedError("The operator 'aten::_int_mm' is not implemented\nmore of it")

    monkeypatch.setattr(torch, "_int_mm", missing)
    with pytest.raises(UserError) as raised:
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", base_quantization="int8"))
    reason = "The operator 'aten::_int_mm' is not implemented"
    assert str(raised.value) == f"--base_quantization int8 does not work on this cpu ({reason}); leave it out"


def test_a_network_trains_on_it(tiny_file, pictures, tmp_path):
    words = {"base_quantization": "int8", "network_train_unet_only": True}
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **words))
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    with pytest.raises(UserError, match="--base_quantization does not go with --fp8_base"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **words, fp8_base=True))
