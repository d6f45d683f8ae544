"""LoHa, LoKr and DoRA compute what their formulas say, on layers in any form, and as LyCORIS and ComfyUI do."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.onednn import compute_with_onednn
from library.layers.swapped import Linear as SwappedLinear
from networks import dora, loha, lokr
from networks.base import Adapter, AdapterNetwork

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
