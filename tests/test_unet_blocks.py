"""Blocks that keep little for the backward pass: values and gradients of diffusers' own, from fewer bytes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.families.base import AdapterTarget
from library.families.modules import checkpoint_gradients, unet_layers
from library.layers.norms import group_norm, layer_norm
from library.layers.unet_blocks import BasicTransformerBlock, ResnetBlock2D, keep_little
from library.training.memory_estimate import LikeCuda, LiveBytes
from networks import lora
from tests import tiny

SIDE = 16  # latent cells


def unet_with_network(kind: str, is_ours: bool, conv: bool = True, dtype: torch.dtype = torch.float32):
    """A toy U-Net with adapters that change it, with diffusers' own blocks or with ours."""
    unet = copy.deepcopy(tiny.models(kind).unet).requires_grad_(False).to(dtype)
    if is_ours:
        keep_little(unet)
    targets = [AdapterTarget(path.replace(".", "_"), layer, "unet") for path, layer in unet_layers(unet, conv)]
    network = lora.create_network(targets, 4, 4, conv_dim="4").to(dtype).train()
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.apply_to()
    return unet, network


def loss_of(
    unet: UNet2DConditionModel, kind: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, SIDE, SIDE, generator=generator).to(device, dtype)
    hidden = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator).to(device, dtype)
    added = {"text_embeds": torch.zeros(2, 64, dtype=dtype), "time_ids": torch.zeros(2, 6)} if kind == "sdxl" else {}
    added = {name: value.to(device) for name, value in added.items()}
    timesteps = torch.tensor([1, 900], device=device)
    prediction = unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noisy.float())


def gradients_of(unet: nn.Module, network: nn.Module, kind: str, *where: torch.dtype | torch.device) -> list[Tensor]:
    """Loss and gradients; `where` is the dtype and the device, as of `loss_of`."""
    loss = loss_of(unet, kind, *where)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in network.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", tiny.TOYS)
def test_loss_and_gradients_are_those_of_diffusers_own_blocks(kind, checkpointing):
    plain, ours = (unet_with_network(kind, is_ours) for is_ours in (False, True))
    assert sum(isinstance(module, (ResnetBlock2D, BasicTransformerBlock)) for module in ours[0].modules()) > 10
    if checkpointing:
        checkpoint_gradients(ours[0], (), None)
    found, wanted = (torch.cat([g.flatten() for g in gradients_of(*parts, kind)]) for parts in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_in_bf16_gradients_are_no_further_from_those_in_fp32():
    exact = gradients_of(*unet_with_network("sd1", False), "sd1")
    errors = []
    for is_ours in (True, False):
        found = gradients_of(*unet_with_network("sd1", is_ours, dtype=torch.bfloat16), "sd1", torch.bfloat16)
        errors.append(sum((a.float() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)).item())
    assert errors[0] < 1.05 * errors[1]


def kept(kind: str, is_ours: bool, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes that live between the forward and the backward pass, and after it."""
    unet, network = unet_with_network(kind, is_ours, conv=False)
    if checkpointing:
        checkpoint_gradients(unet, (), None)
    with LiveBytes("cpu") as memory:
        memory.note_all(unet)
        memory.note_all(network)
        before = memory.now
        loss = loss_of(unet, kind)
        between = memory.now - before
        loss.backward()
        del loss
    return between, memory.now - before - sum(parameter.nbytes for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_less_than_two_thirds_are_kept_and_nothing_stays_after_the_backward_pass(kind):
    (plain, _), (ours, after) = (kept(kind, is_ours) for is_ours in (False, True))
    assert ours < 0.66 * plain
    assert after == 0
    assert kept(kind, True, checkpointing=True)[0] < kept(kind, False, checkpointing=True)[0] < ours


def kept_by_a_block(is_ours: bool) -> float:
    """What lives after the forward pass of a transformer block with adapters on all layers, in sizes of its input."""
    with torch.device("meta"):
        model = nn.ModuleList([Transformer2DModel(8, 40, in_channels=320, cross_attention_dim=64)]).requires_grad_(
            False
        )
        model.conv_norm_out, model.conv_act = None, None
        if is_ours:
            keep_little(model)
        (block,) = model[0].transformer_blocks
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        targets = [AdapterTarget(name.replace(".", "_"), layer, "unet") for name, layer in layers.items()]
        lora.create_network(targets, 1, 1).train().apply_to()
        x, text = torch.empty(1, 4096, 320, requires_grad=True), torch.empty(1, 1, 64)
        with LiveBytes() as memory, LikeCuda(None):
            result = block(x, encoder_hidden_states=text)
            assert result.shape == x.shape
            return memory.now / x.nbytes


def test_a_transformer_block_makes_norms_and_the_inside_of_geglu_again():
    """Three norms of its input's size, and of four times that gelu(b) and a gelu(b)."""
    assert kept_by_a_block(False) - kept_by_a_block(True) == pytest.approx(3 + 4 + 4, abs=0.1)


def test_norms_whose_forward_adapters_replaced_are_asked():
    unet, _ = unet_with_network("sd1", True)
    asked = []
    norms = [module for module in unet.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    for norm in norms:
        norm.forward = lambda x, norm=norm: (asked.append(norm), type(norm).forward(norm, x))[1]
    loss_of(unet, "sd1").backward()
    assert len(asked) == len(norms)


class Conversions(TorchDispatchMode):
    """Counts tensors of one dimension that are converted."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].ndim == 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 8), nn.LayerNorm(8)], ids=["group", "layer"])
def test_weights_of_norms_are_converted_once_and_again_where_they_change_or_are_replaced(norm):
    norm = norm.to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def conversions() -> int:
        x.grad = None
        with Conversions() as found:
            is_layer = isinstance(norm, nn.LayerNorm)
            out, _ = layer_norm(norm, x, True) if is_layer else group_norm(norm, x, silu=False, again=True)
            out.sum().backward()
        exact = copy.deepcopy(norm).float()(x.float())
        torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)
        return found.count

    assert [conversions(), conversions()] == [2, 0]
    norm.bias.add_(1)
    assert [conversions(), conversions()] == [2, 0]
    norm.load_state_dict({name: 2 * value for name, value in norm.state_dict().items()})
    assert [conversions(), conversions()] == [2, 0]
    norm.weight = nn.Parameter(-norm.weight, requires_grad=False)
    assert [conversions(), conversions()] == [2, 0]
    norm.bias.data = norm.bias + 1
    assert [conversions(), conversions()] == [2, 0]
