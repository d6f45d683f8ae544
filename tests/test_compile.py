"""--torch_compile and --cpu_offload_checkpointing: the same numbers, in another way."""

import pytest
import torch
from diffusers import Transformer2DModel
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.options.groups import PrecisionOptions
from library.training.compiling import check_compiler, compile_unet
from library.training.precision import checkpoint_in_main_memory
from networks import lora

COMPILED = PrecisionOptions(torch_compile=True, dynamo_backend="aot_eager")
OF_FAMILY = {"sd1": {}, "sdxl": {"num_layers": 2, "use_linear_projection": True}}


def transformer(family: str = "sd1") -> Transformer2DModel:
    """What a U-Net has at each of its levels."""
    torch.manual_seed(0)
    model = Transformer2DModel(2, 16, in_channels=32, norm_num_groups=8, cross_attention_dim=32, **OF_FAMILY[family])
    return model.requires_grad_(False)


def with_network(model: nn.Module) -> lora.AdapterNetwork:
    layers = {name.replace(".", "_"): layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    network = lora.create_network([AdapterTarget(name, layer, "unet") for name, layer in layers.items()], 4, 4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.apply_to()
    return network


def loss_and_gradients(model: nn.Module, network: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, hidden = torch.randn(2, 32, 4, 4, generator=generator), torch.randn(2, 7, 32, generator=generator)
    network.zero_grad()
    loss = model(x, hidden, return_dict=False)[0].square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize("family", OF_FAMILY)
def test_a_compiled_model_gives_the_same_loss_and_gradients_with_fp8_and_adapters(family):
    model = transformer(family)
    hold_in_fp8(model)
    network = with_network(model)
    plain = loss_and_gradients(model, network)
    names = [name for name, _ in model.named_modules()]
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compile_unet(model, COMPILED)
    compiled = loss_and_gradients(model, network)
    assert graphs["unique_graphs"] > before, "nothing was compiled"
    assert [name for name, _ in model.named_modules()] == names
    for ours, wanted in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert abs(loss_and_gradients(model, network)[0] - compiled[0]) > 1e-3, "the weights were compiled in"


def test_blocks_of_one_kind_and_size_share_code(caplog):
    *compiled, plain = [(model := transformer(), with_network(model)) for _ in range(3)]
    wanted = loss_and_gradients(*plain)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    compile_unet(nn.ModuleList(model for model, _ in compiled), COMPILED)
    for parts in compiled:
        torch.testing.assert_close(loss_and_gradients(*parts), wanted, rtol=1e-4, atol=1e-6)
    assert graphs["unique_graphs"] == before + 1
    assert not said_by_us(caplog)


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_a_line_says_so(caplog):
    model = transformer()
    network = with_network(model)
    plain = loss_and_gradients(model, network)
    feed_forward = model.transformer_blocks[0].ff
    feed_forward.forward = lambda x: (torch._dynamo.graph_break(), type(feed_forward).forward(feed_forward, x))[1]
    compile_unet(model, COMPILED)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(model, network), plain, rtol=1e-4, atol=1e-6)
    line = "--torch_compile: a BasicTransformerBlock runs without being compiled"
    assert [message.partition(" (")[0] for message in said_by_us(caplog)] == [line]


def test_at_the_limit_of_recompilations_blocks_run_as_they_are_and_a_line_says_so(caplog):
    model = transformer()
    network = with_network(model)
    wanted = loss_and_gradients(model, network)
    torch._dynamo.reset()
    compile_unet(model, COMPILED)
    with torch._dynamo.config.patch(recompile_limit=1):
        for side in (4, 6, 8):
            model(torch.zeros(2, 32, side, side), torch.zeros(2, 7, 32))
        torch.testing.assert_close(loss_and_gradients(model, network), wanted, rtol=1e-4, atol=1e-6)
    lines = [message.partition(" (")[0] for message in said_by_us(caplog)]
    assert lines == ["--torch_compile: a BasicTransformerBlock runs without being compiled"]


def said_by_us(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("library.")]


def test_a_backend_that_is_not_here_is_one_sentence():
    check_compiler(PrecisionOptions(dynamo_backend="ofi"), torch.device("cpu"))  # without --torch_compile
    check_compiler(PrecisionOptions(torch_compile=True, dynamo_backend="eager"), torch.device("cpu"))
    with pytest.raises(UserError, match="--torch_compile: --dynamo_backend ofi does not work here .*Invalid backend"):
        check_compiler(PrecisionOptions(torch_compile=True, dynamo_backend="ofi"), torch.device("cpu"))


def test_a_checkpointed_block_keeps_its_inputs_alone_and_runs_again():
    model = transformer()
    network = with_network(model)
    plain = loss_and_gradients(model, network)
    calls = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing(checkpoint_in_main_memory)
    model.train()
    for ours, wanted in zip(loss_and_gradients(model, network), plain, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert len(calls) == 2 * len(model.transformer_blocks)
