"""Every network on a base in fp8, int8 and nf4: it computes over the weights as they are held, and is what it is."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import hold_in_nf4
from library.network_files import read_weights
from networks.base import AdapterNetwork
from tests import tiny
from tests.results import weights_equal
from tests.test_networks import ALGORITHMS, everything
from train_network import train

LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (3, 9, 64)),
    "conv1x1": (lambda: nn.Conv2d(64, 32, 1), (2, 64, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(64, 32, 3, stride=2, padding=1), (2, 64, 6, 6)),
}
FORMS = {"fp8": hold_in_fp8, "int8": hold_in_int8, "nf4": hold_in_nf4}
OF_THE_WEIGHT = "networks.dora", "networks.ia3", "networks.oft"  # whose change is another one for another weight
matrix = [
    pytest.mark.parametrize("kind", LAYERS),
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("algorithm", ALGORITHMS),
]


def on_all(test):
    for mark in matrix:
        test = mark(test)
    return test


def network_on(layer: nn.Module, algorithm: str) -> AdapterNetwork:
    targets = [AdapterTarget("lora_unet_layer", layer, "unet")]
    return importlib.import_module(algorithm).create_network(targets, 4, 2, **everything(algorithm))


def built(algorithm: str, form: str, kind: str) -> tuple[nn.Module, nn.Module, AdapterNetwork, Tensor]:
    """A layer as it was, the same in fewer bits, a new network on that, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make().requires_grad_(False)
    (held,) = model = nn.Sequential(copy.deepcopy(plain))
    FORMS[form](model)
    return plain, held, network_on(held, algorithm), torch.randn(shape)


def train_a_little(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def difference(value: Tensor, wanted: Tensor) -> float:
    return ((value - wanted).norm() / wanted.norm()).item()


def results(layer: nn.Module, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient of the input, and those of the network."""
    torch.manual_seed(1)  # DyLoRA draws ranks
    x = x.clone().requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return output.detach(), x.grad, own


@on_all
def test_it_begins_as_nothing_and_computes_as_over_the_rounded_weight(algorithm, form, kind):
    """int8 rounds inputs too, so there the numbers are near."""
    _, held, network, x = built(algorithm, form, kind)
    before = held(x)
    network.apply_to()
    assert torch.equal(held(x), before)
    train_a_little(network)
    rounded = LAYERS[kind][0]().requires_grad_(False)
    rounded.load_state_dict({"weight": held.weight, "bias": held.bias})
    over_rounded = network_on(rounded, algorithm)
    over_rounded.load_state_dict(network.state_dict())
    over_rounded.apply_to()
    ours, wanted = results(held, network, x), results(rounded, over_rounded, x)
    is_near = form == "int8" and kind == "linear"
    for mine, theirs in zip([*ours[:2], *ours[2]], [*wanted[:2], *wanted[2]], strict=True):
        assert difference(mine, theirs) < (0.03 if is_near else 1e-5) or not (mine.any() or theirs.any())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in held.parameters())
    assert any(gradient.any() for gradient in ours[2])


@on_all
def test_its_file_is_the_same_on_that_base_and_the_same_change_of_the_plain_one(algorithm, form, kind, tmp_path):
    plain, held, network, x = built(algorithm, form, kind)
    train_a_little(network)
    network.apply_to()
    trained, change = held(x), next(iter(network.adapters())).delta_weight().detach()
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.remove()
    again = network_on(held, algorithm)
    again.load_weights(tmp_path / "a.safetensors")
    again.apply_to()
    tolerance = 1e-6 if algorithm == "networks.adalora" else 0  # whose file is a product of its parts
    torch.testing.assert_close(held(x), trained, rtol=tolerance, atol=tolerance)
    weight = plain.weight.clone()
    on_plain = network_on(plain, algorithm)
    on_plain.load_weights(tmp_path / "a.safetensors")
    on_plain.merge()
    rounding = {"fp8": 0.04, "int8": 0.01, "nf4": 0.12}[form]
    assert difference(plain.weight - weight, change) < (rounding if algorithm in OF_THE_WEIGHT else 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_pissa_begins_with_the_rounded_weight_and_is_a_change_of_any(form):
    torch.manual_seed(0)
    (held,) = model = nn.Sequential(nn.Linear(64, 32).requires_grad_(False))
    FORMS[form](model)
    x, before = torch.randn(20, 64), held.weight
    network = importlib.import_module("networks.lora").create_network(
        [AdapterTarget("lora_unet_layer", held, "unet")], 4, 4, init="pissa"
    )
    (adapter,) = network.adapters()
    left, values, right = torch.linalg.svd(before)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(adapter.lora_up.weight @ adapter.lora_down.weight, best, rtol=1e-3, atol=1e-4)
    output = held(x)
    network.apply_to()
    assert difference(held(x), output) < 1e-6


RESUMED = {  # the widths with LoRA, and the other networks with one of them
    "fp8": dict(fp8_base=True),
    "int8": dict(base_quantization="int8"),
    "text encoders in fp8 too, in bf16": dict(fp8_base=True, mixed_precision="bf16"),
    **{name: dict(base_quantization="nf4", network_module=name) for name in ALGORITHMS},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_same_bits(name, tiny_file, pictures, tmp_path):
    common = dict(max_train_epochs=None, max_train_steps=4, learning_rate=0.01, network_train_unet_only=True)
    common |= RESUMED[name] | ({"network_dim": None} if name == "networks.ia3" else {})  # it has no ranks
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", save_state=True, save_every_n_steps=2, **common))
    state = tmp_path / "whole" / "lora-step00000002-state"
    train(tiny.arguments(tiny_file, pictures, tmp_path / "resumed", resume=state, **common))
    files = [tmp_path / folder / "lora.safetensors" for folder in ("whole", "resumed")]
    assert weights_equal(*files)
    assert any(value.any() for key, value in read_weights(files[0]).items() if not key.endswith("alpha"))
