"""LoHa, LoKr and DoRA compute what their formulas say, on layers in any form, and as LyCORIS and ComfyUI do."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.file import open_adapter
from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.onednn import compute_with_onednn
from library.layers.swapped import Linear as SwappedLinear
from library.network_files import read_weights, write_weights
from networks import dora, dora_arguments, loha, loha_arguments, lokr, lokr_arguments, lora_arguments
from networks.base import Adapter, AdapterNetwork
from networks.dora_function import scaled, scaled_gradients

LAYERS = {
    "linear": (lambda: nn.Linear(36, 24), (2, 5, 36)),
    "linear of rows": (lambda: nn.Linear(36, 24, bias=False), (6, 36)),
    "conv1x1": (lambda: nn.Conv2d(36, 24, 1), (2, 36, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(36, 24, 3, stride=2, padding=1), (2, 36, 7, 7)),
    "conv3x3 of few pixels": (lambda: nn.Conv2d(36, 24, 3, padding=1), (1, 36, 3, 3)),
}
NETWORKS = {
    "loha of rank 1": (loha, 1, {}),
    "loha of rank 9": (loha, 9, {}),
    "loha tucker": (loha, 2, {"use_tucker": "True"}),
    "lokr": (lokr, 2, {}),
    "lokr of both": (lokr, 1, {"decompose_both": "True", "factor": "6"}),
    "lokr whole": (lokr, 2, {"full_matrix": "True", "factor": "2"}),
    "lokr tucker": (lokr, 1, {"use_tucker": "True"}),
    "dora": (dora, 2, {}),
    "dora of outputs": (dora, 2, {"wd_on_output": "True"}),
}
FORMS = {
    "plain": lambda model: None,
    "fp8": hold_in_fp8,
    "onednn": compute_with_onednn,
    "swapped": lambda model: [setattr(x, "__class__", SwappedLinear) for x in model if type(x) is nn.Linear],
}


def network_on(model: nn.Sequential, name: str) -> AdapterNetwork:
    module, rank, arguments = NETWORKS[name]
    targets = [AdapterTarget(f"lora_unet_{i}", layer, "unet") for i, layer in enumerate(model)]
    return module.create_network(targets, rank, 1.5, **{"conv_dim": str(rank), "conv_alpha": "1.5"} | arguments)


def train_a_little(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def low_rank(values: dict[str, Tensor], a: str, b: str, core: str) -> Tensor:
    """A B, or the Tucker form, flattened to a matrix."""
    if core in values:
        return torch.einsum("mnkl,mo,ni->oikl", values[core], values[a], values[b]).flatten(1)
    return values[a] @ values[b].flatten(1)


def formula(adapter: Adapter, values: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The changed weight; the norm of DoRA is a constant."""
    scale = adapter.scale
    if "hada_w1_a" in values:
        halves = [low_rank(values, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in "12"]
        return weight + scale * (halves[0] * halves[1]).view_as(weight)
    if "dora_scale" in values:
        change = values["lora_up.weight"].flatten(1) @ values["lora_down.weight"].flatten(1)
        changed = weight + scale * change.view_as(weight)
        others = [axis for axis in range(weight.ndim) if values["dora_scale"].shape[axis] == 1]
        return values["dora_scale"] * changed / changed.square().sum(others, keepdim=True).sqrt().detach()
    first = values.get("lokr_w1") if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    second = (
        values["lokr_w2"].flatten(1) if "lokr_w2" in values else low_rank(values, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    )
    return weight + scale * torch.kron(first, second).view_as(weight)


class Plain(nn.Module):
    """A layer by its formula and autograd, with parameters of its own."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.adapter = [adapter]
        self.values = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        base = self.adapter[0].base
        weight = formula(self.adapter[0], self.values, base.weight.detach())
        if weight.ndim == 2:
            return F.linear(x, weight, base.bias)
        return F.conv2d(x, weight, base.bias, base.stride, base.padding)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_network_changes_no_bit_of_the_output(name, kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(make().requires_grad_(False)), torch.randn(shape)
    before = model(x)
    network_on(model, name).train().apply_to()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_output_and_gradients_are_those_of_the_formula(name, kind, form, is_flat):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make().requires_grad_(False))
    FORMS[form](model)
    network = network_on(model, name).train()
    network.apply_to()
    train_a_little(network)
    (adapter,) = network.adapters()
    plain = Plain(adapter)
    if is_flat:
        network.flatten([{"params": list(network.parameters())}], torch.float32)
    x = torch.randn(shape)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    outputs = model(ours), plain(theirs)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    gradients = {id(span.parameter): span.of(network.flat.gradients) for span in network.flat.spans} if is_flat else {}
    for own, parameter in adapter.named_parameters():
        got, wanted = gradients.get(id(parameter), parameter.grad), plain.values[own].grad
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item(), msg=own)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_the_buffer_with_dropouts_too(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 24).requires_grad_(False))
    module, rank, arguments = NETWORKS[name]
    arguments = arguments | {"conv_dim": "1", "rank_dropout": "0.5"}
    targets = [AdapterTarget("lora_unet_0", model[0], "unet")]
    network = module.create_network(targets, rank, 1.5, neuron_dropout=0.1, **arguments).train()
    network.apply_to()
    train_a_little(network)
    network.flatten([{"params": list(network.parameters())}], torch.float32)
    model(torch.randn(9, 36)).square().sum().backward()
    assert network.flat.used() and all(span.of(network.flat.gradients).any() for span in network.flat.spans)


@pytest.mark.parametrize("name", NETWORKS)
def test_fifty_steps_are_those_of_the_formula(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 24), nn.SiLU(), nn.Linear(24, 36)).requires_grad_(False)
    targets = nn.ModuleList([model[0], model[2]])
    network = network_on(targets, name).train()
    network.apply_to()
    train_a_little(network)
    plain = nn.Sequential(Plain(network.adapters()[0]), nn.SiLU(), Plain(network.adapters()[1]))
    values = {f"{i}.{own}": value for i in (0, 2) for own, value in plain[i].values.items()}
    ours, theirs = (torch.optim.AdamW(list(p), lr=1e-3) for p in (network.parameters(), values.values()))
    for step in range(50):
        x = torch.randn(2, 7, 36, generator=torch.Generator().manual_seed(step))
        for computed, optimizer in ((model, ours), (plain, theirs)):
            (computed(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for trained, wanted in zip(network.parameters(), values.values(), strict=True):
        torch.testing.assert_close(trained, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "dora of outputs"])  # which keeps its output
def test_only_the_input_and_what_is_small_are_kept_for_the_backward_pass(name, kind):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make().requires_grad_(False))
    network = network_on(model, name).train()
    network.apply_to()
    kept: list[Tensor] = []
    x = torch.randn(80, *shape[1:])
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        model(x)
    assert [value.shape for value in kept if value.numel() > 36 * 24 * 8] == [x.shape]  # not the weight, for one


@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("dora")])
def test_a_change_that_is_small_beside_the_weights_is_not_lost_in_16_bits(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 24, bias=False).requires_grad_(False))
    network = network_on(model, name)
    train_a_little(network)
    network.limit_norms(0.002 * model[0].weight.norm().item())
    x = torch.randn(200, 12) @ torch.linalg.svd(model[0].weight).Vh[24:]  # of which the weights make nothing
    (adapter,) = network.adapters()
    x, change = x.bfloat16(), adapter.delta_weight()
    model.bfloat16()
    wanted = F.linear(x.float(), model[0].weight.float() + change)
    network.apply_to()
    assert (model(x) - wanted).norm() < 0.02 * F.linear(x.float(), change).norm()


LYCORIS = {  # module, class and arguments there
    "loha of rank 9": ("loha", "LohaModule", {}),
    "loha tucker": ("loha", "LohaModule", {"use_tucker": True}),
    "lokr": ("lokr", "LokrModule", {}),
    "lokr of both": ("lokr", "LokrModule", {"decompose_both": True, "factor": 6}),
    "lokr whole": ("lokr", "LokrModule", {"full_matrix": True, "factor": 2}),
    "lokr tucker": ("lokr", "LokrModule", {"use_tucker": True}),
    "dora": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "dora of outputs": ("locon", "LoConModule", {"weight_decompose": True}),
}


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("name", LYCORIS)
def test_files_of_lycoris_give_here_what_they_give_there_and_new_files_are_alike(name, kind, tmp_path):
    pytest.importorskip("lycoris")
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make().requires_grad_(False), torch.randn(shape)
    file, kind_of_theirs, arguments = LYCORIS[name]
    module, rank, _ = NETWORKS[name]
    theirs = getattr(import_module(f"lycoris.modules.{file}"), kind_of_theirs)("", layer, 1.0, rank, 1.5, **arguments)
    train_a_little(theirs)
    weights = {f"lora_unet_0.{key}": value.detach() for key, value in theirs.custom_state_dict().items()}
    path = tmp_path / "a.safetensors"
    write_weights(path, weights, None, None)
    new = network_on(nn.Sequential(layer), name).state_dict()
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in weights.items()}
    network = module.create_network_from_weights([AdapterTarget("lora_unet_0", layer, "unet")], path)
    wanted = theirs(x)
    network.apply_to()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_lokr_divides_sizes_as_lycoris_does():
    functional = pytest.importorskip("lycoris.functional")
    for size in range(1, 300):
        for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 37):
            assert lokr.divided(size, factor) == functional.factorization(size, factor)


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_independent_reader_of_files_finds_the_same_change(name, kind, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind][0]().requires_grad_(False))
    network = network_on(model, name)
    train_a_little(network)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    (read,) = open_adapter(tmp_path / "a.safetensors", "--network_weights").layers.values()
    (adapter,) = network.adapters()
    torch.testing.assert_close(read.delta(model[0].weight), adapter.delta_weight(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_output", ["True", "False"])
def test_norms_of_dora_stay_in_fp32_in_training_and_in_files(on_output, tmp_path):
    """16 bits of a norm of 1 are 0.001 apart, which is as much as training changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 24).requires_grad_(False)).bfloat16()
    network = dora.create_network([AdapterTarget("lora_unet_0", model[0], "unet")], 2, 1, wd_on_output=on_output)
    network.to(torch.bfloat16)
    x = torch.randn(3, 36).bfloat16()
    before = model(x)
    network.apply_to()
    assert torch.equal(model(x), before)
    network.save_weights(tmp_path / "a.safetensors", torch.float16, None)
    weights = read_weights(tmp_path / "a.safetensors")
    assert torch.equal(weights["lora_unet_0.dora_scale"], network.state_dict()["lora_unet_0.dora_scale"])
    assert {name: value.dtype for name, value in weights.items()} == {
        "lora_unet_0.alpha": torch.float16, "lora_unet_0.dora_scale": torch.float32,
        "lora_unet_0.lora_down.weight": torch.float16, "lora_unet_0.lora_up.weight": torch.float16,
    }  # fmt: skip


@pytest.mark.parametrize("on_output", ["True", "False"])
def test_norms_of_dora_are_computed_once_between_two_updates_of_the_weights(on_output, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 24).requires_grad_(False))
    targets = [AdapterTarget("lora_unet_0", model[0], "unet")]
    network = dora.create_network(targets, 2, 1, wd_on_output=on_output).train()
    network.apply_to()
    network.training_begins(num_steps=2, step=0)
    (adapter,) = network.adapters()
    computed, norms = [], adapter._norms
    monkeypatch.setattr(adapter, "_norms", lambda *matrices: computed.append(1) or norms(*matrices))
    x = torch.randn(5, 36)
    for count in (1, 2):
        for _ in range(3):
            output = model(x)
        assert len(computed) == count
        torch.testing.assert_close(output, F.linear(x, model[0].weight + adapter.delta_weight(), model[0].bias))
        train_a_little(network)
        network.weights_updated(taken=True)


@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 12, 3, 4)])
def test_gains_act_on_16_bits_as_they_do_on_32(shape, has_shift):
    torch.manual_seed(0)
    values, gradient = (torch.randn(shape).bfloat16() for _ in range(2))
    gain, shift = 1 + torch.rand(12), torch.randn(12) if has_shift else None
    made = scaled(values, gain, shift), *scaled_gradients(gradient, values, gain, shift)
    exact = scaled(values.float(), gain, shift), *scaled_gradients(gradient.float(), values.float(), gain, shift)
    for found, wanted in zip(made, exact, strict=True):
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=0.008, atol=1e-5)
    torch.testing.assert_close(made[2], exact[2])


def test_layers_of_a_file_that_do_not_fit_are_a_mistake(tmp_path):
    model = nn.Sequential(nn.Linear(36, 24))
    network_on(model, "loha of rank 1").save_weights(tmp_path / "a.safetensors", None, None)
    targets = [AdapterTarget("lora_unet_0", nn.Linear(36, 20), "unet")]
    with pytest.raises(UserError, match=r"a.safetensors.*lora_unet_0.*20 outputs and 36 inputs"):
        loha.create_network_from_weights(targets, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (lora_arguments, "wd_on_output=True"),
        (dora_arguments, "wd_on_output=True"),
        (lokr_arguments, "use_tucker=True"),
    ],
)
def test_what_some_programs_apply_otherwise_is_said(arguments, sentence, caplog):
    given = {"conv_dim": "2", sentence.partition("=")[0]: "True"}
    arguments.check_arguments(given | ({"dora": "True"} if arguments is lora_arguments else {}))
    assert sentence in caplog.text


@pytest.mark.parametrize(
    ("arguments", "given", "sentence"),
    [
        (lora_arguments, {"wd_on_output": "True"}, "wd_on_output needs dora"),
        (loha_arguments, {"use_tucker": "True"}, "use_tucker needs conv_dim"),
        (loha_arguments, {"conv_dim": "2", "use_tucker": "maybe"}, "use_tucker must be True or False, got 'maybe'"),
        (lokr_arguments, {"factor": "0"}, "factor must be a number above 0, or -1"),
        (lokr_arguments, {"algo": "lokr"}, "networks.lokr has no argument algo"),
    ],
)
def test_arguments_that_cannot_be_are_a_mistake(arguments, given, sentence):
    with pytest.raises(UserError, match=sentence):
        arguments.check_arguments(given)
