"""LoRA as one function with its weights in one buffer is the LoRA of the formula, trained by PyTorch's own AdamW."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.onednn import compute_with_onednn
from library.training.flat_optimizer import FlatOptimizer, can_be_flat
from networks.base import AdapterNetwork
from networks.lora_adapter import LoraAdapter, LoraNetwork

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "linear of rows": (lambda: nn.Linear(12, 8, bias=False), (6, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), (2, 12, 7, 7)),
}


class Plain(nn.Module):
    """The formula, by autograd, with parameters of its own."""

    def __init__(self, adapter: LoraAdapter):
        super().__init__()
        self.adapter = [adapter]
        self.down = nn.Parameter(adapter.lora_down.weight.detach().clone())
        self.up = nn.Parameter(adapter.lora_up.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter[0]
        layer, scale = adapter.base, adapter.scale
        if self.down.ndim == 2:
            return F.linear(x, layer.weight, layer.bias) + scale * (x @ self.down.T) @ self.up.T
        hidden = F.conv2d(x, self.down, None, layer.stride, layer.padding)
        return layer._conv_forward(x, layer.weight, layer.bias) + scale * F.conv2d(hidden, self.up)


def adapter_of(kind: str, in_fp8: bool = False) -> tuple[LoraAdapter, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make().requires_grad_(False))
    if in_fp8:
        hold_in_fp8(model)
    adapter = LoraAdapter(AdapterTarget("lora_unet_layer", model[0], "unet"), 3, 2)
    nn.init.normal_(adapter.lora_up.weight)
    return adapter.train(), torch.randn(shape)


@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_those_of_the_formula(kind, is_flat, in_fp8):
    adapter, x = adapter_of(kind, in_fp8)
    plain = Plain(adapter)
    network = AdapterNetwork({"layer": adapter})
    network.apply_to()
    if is_flat:
        network.flatten([{"params": list(network.parameters())}], torch.float32)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    outputs = adapter.base(ours), plain(theirs)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    if is_flat:
        down, up = (span.of(network.flat.gradients) for span in network.flat.spans)
    else:
        down, up = adapter.lora_down.weight.grad, adapter.lora_up.weight.grad
    torch.testing.assert_close(down, plain.down.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up, plain.up.grad, rtol=1e-5, atol=1e-5)


def test_only_the_input_and_the_small_matrices_are_kept_for_the_backward_pass():
    adapter, x = adapter_of("linear")
    adapter.attach()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        adapter.base(x)
    assert sorted(tuple(value.shape) for value in kept) == [(2, 5, 12), (3, 12), (8, 3)]


def two_networks() -> tuple[nn.Module, AdapterNetwork, nn.Module, AdapterNetwork]:
    """Two models with the same network on some layers; no gradient reaches the last one."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 4), nn.Linear(5, 5)).requires_grad_(False)
        layers = [model[0], model[2], model[3]]
        adapters = {f"lora_{i}": LoraAdapter(AdapterTarget(f"lora_{i}", x, "unet"), 2, 1) for i, x in enumerate(layers)}
        network = AdapterNetwork(adapters)
        network.apply_to()
        made += [model, network.train()]
    return tuple(made)


def groups_of(network: AdapterNetwork) -> list[dict]:
    """Rates as LoRA+ sets them."""
    usual = [adapter.lora_down.weight for adapter in network.adapters()]
    return [{"params": usual, "lr": 0.01}, {"params": [a.lora_up.weight for a in network.adapters()], "lr": 0.05}]


def plain_optimizer(network: AdapterNetwork) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups_of(network), weight_decay=0.1)


def flat_optimizer(network: AdapterNetwork) -> FlatOptimizer:
    optimizer = plain_optimizer(network)
    network.flatten(optimizer.param_groups, torch.float32)
    assert can_be_flat(optimizer, torch.device("cpu"))
    return FlatOptimizer(optimizer, network.flat)


def train(model: nn.Module, network: AdapterNetwork, optimizer, steps: range) -> None:
    """Steps of two backward passes each, clipped to a norm of 1."""
    for number in steps:
        for x in torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(number)):
            (model[:3](x) - 1).square().mean().backward()
        if isinstance(optimizer, FlatOptimizer):
            assert optimizer.step_if_finite(1.0)
            network.flat.gradients.zero_()
        else:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def assert_same(network: AdapterNetwork, other: AdapterNetwork) -> None:
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_fifty_steps_are_those_of_adamw_and_layers_without_gradients_stay():
    model, network, other_model, other = two_networks()
    untouched = network.lora_2.lora_down.weight.detach().clone()
    optimizer, plain = flat_optimizer(network), plain_optimizer(other)
    train(model, network, optimizer, range(50))
    train(other_model, other, plain, range(50))
    assert_same(network, other)
    assert torch.equal(network.lora_2.lora_down.weight, untouched)  # weight decay alone would have changed it


@pytest.mark.parametrize("flat_first", [True, False])
def test_states_of_both_forms_are_the_same(flat_first):
    """So a state of PyTorch's own AdamW, as kohya writes it, goes on here, and ours there."""
    model, network, other_model, other = two_networks()
    optimizer, plain = flat_optimizer(network), plain_optimizer(other)
    train(model, network, optimizer, range(5))
    train(other_model, other, plain, range(5))
    begun, rest = (optimizer, (other_model, other, plain)) if flat_first else (plain, (model, network, optimizer))
    rest[2].load_state_dict(begun.state_dict())
    train(model, network, optimizer, range(5, 10))
    train(other_model, other, plain, range(5, 10))
    assert_same(network, other)
    storages = [value.untyped_storage().data_ptr() for state in optimizer.state_dict()["state"].values()
                for value in state.values()]  # fmt: skip
    assert len(set(storages)) == len(storages) == 12


def test_a_step_on_gradients_that_are_no_numbers_changes_nothing():
    model, network, *_ = two_networks()
    optimizer = flat_optimizer(network)
    train(model, network, optimizer, range(3))
    before = network.flat.values.clone(), optimizer.state_dict()["state"]
    network.flat.gradients[5] = math.inf
    assert not optimizer.step_if_finite(1.0)
    assert torch.equal(network.flat.values, before[0])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][name], value) for i, state in before[1].items() for name, value in state.items())


def test_in_bf16_layers_compute_with_a_copy_and_fp32_gradients_add_up():
    layers = [nn.Linear(4, 4).bfloat16() for _ in range(3)]
    adapters = {f"lora_{i}": LoraAdapter(AdapterTarget(f"lora_{i}", x, "unet"), 2, 1) for i, x in enumerate(layers)}
    network = AdapterNetwork(adapters).train()
    network.flatten([{"params": list(network.parameters())}], torch.bfloat16)
    flat = network.flat
    with torch.no_grad():
        flat.values.add_(0.1)
    flat.refresh()
    assert torch.equal(flat.computed, flat.values.bfloat16())
    for value in (1.0, 2.0**-10):  # their sum is no bf16 number
        flat.collected.fill_(value)
        flat.collect()
    assert torch.equal(flat.gradients, torch.full_like(flat.gradients, 1 + 2.0**-10))
    assert not flat.collected.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_compute_together_what_each_would_alone(dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(64, 32, dtype=dtype) for name in ("q", "k", "v")}).requires_grad_(False)

    def network_on(together: bool) -> AdapterNetwork:
        made = {}
        for name, layer in model.items():
            target = AdapterTarget(f"lora_{name}", layer, "unet", input="attn1" if together else None)
            made[target.name] = LoraAdapter(target, 4, 2)
            made[target.name].load_state_dict(weights[name]) if name in weights else None
            nn.init.normal_(made[target.name].lora_up.weight) if name not in weights else None
            weights.setdefault(name, {k: v.clone() for k, v in made[target.name].state_dict().items()})
        network = LoraNetwork(made).train()
        network.apply_to()
        network.flatten([{"params": list(network.parameters())}], dtype)
        network.flat.refresh()
        return network

    weights: dict = {}
    x, found = torch.randn(2, 5, 64).to(dtype), []
    for together in (False, True):
        network = network_on(together)
        assert all((adapter.shared is not None) == together for adapter in network.adapters())
        given = x.clone().requires_grad_()
        for _ in range(2):  # accumulated
            outputs = [layer(given) for layer in model.values()]
            sum((output * (number + 1)).sum() for number, output in enumerate(outputs)).backward()
        flat = network.flat
        found.append([*outputs, given.grad, *(span.of(flat.collected).clone() for span in flat.spans)])
        network.remove()
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=0.5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_weights_in_bf16_take_a_step(max_norm):
    """As with --full_bf16, where no number has more than 3 digits."""
    adapter, x = adapter_of("linear")
    adapter.base.bfloat16()
    network = LoraNetwork({"layer": adapter}).bfloat16()
    network.apply_to()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network.flatten(optimizer.param_groups, torch.bfloat16)
    flat = FlatOptimizer(optimizer, network.flat)
    before = network.flat.values.clone()
    adapter.base(x.bfloat16()).float().square().sum().backward()
    assert flat.step_if_finite(max_norm)
    assert not torch.equal(network.flat.values, before)


@pytest.mark.parametrize("form", [compute_with_onednn, hold_in_fp8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_dropped_layer_passes_the_gradient_of_its_frozen_weights_on(kind, form):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make().requires_grad_(False))
    form(model)
    ours, alone = (torch.ones(shape, requires_grad=True) for _ in range(2))
    model(alone).square().sum().backward()
    target = AdapterTarget("lora_unet_layer", model[0], "unet")
    LoraAdapter(target, 3, 2, module_dropout=1.0).train().attach()
    model(ours).square().sum().backward()
    assert torch.equal(ours.grad, alone.grad)
