"""--torch_compile: the compiled U-Net computes the same, adapters and 8-bit weights included."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from library.families.base import AdapterTarget
from library.families.sd import layers_inside
from library.options.groups import PrecisionOptions
from library.training.fp8 import hold_in_fp8
from library.training.precision import compile_unet
from networks import lora


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return model.requires_grad_(False)


def trained(unet: UNet2DConditionModel) -> lora.AdapterNetwork:
    """A network on the transformers whose change is not 0."""
    targets = [AdapterTarget(name, layer, "unet") for name, layer in layers_inside(unet, ("Transformer2DModel",))]
    network = lora.create_network([AdapterTarget(t.name.replace(".", "_"), t.layer, t.part) for t in targets], 4, 4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.apply_to()
    return network


def loss_and_gradients(unet, network) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, hidden = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        loss = unet(noisy, torch.tensor([3, 500]), hidden, return_dict=False)[0].square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in network.parameters())]


def test_the_compiled_unet_gives_the_same_loss_and_gradients(unet):
    hold_in_fp8(unet)
    network = trained(unet)
    plain = loss_and_gradients(unet, network)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compile_unet(unet, PrecisionOptions(torch_compile=True, dynamo_backend="aot_eager"))
    names = [name for name, _ in unet.named_modules()]
    compiled = loss_and_gradients(unet, network)
    assert graphs["unique_graphs"] > before, "nothing was compiled"
    assert not [name for name in names if "_orig_mod" in name]
    for ours, wanted in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
