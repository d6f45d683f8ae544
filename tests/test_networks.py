"""Every algorithm in networks/ goes through one matrix of layers and checks."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.families.base import AdapterTarget

FOLDER = Path(__file__).parents[1] / "networks"
ALGORITHMS = sorted(
    f"networks.{path.stem}" for path in FOLDER.glob("*.py") if "def create_network" in path.read_text(encoding="utf-8")
)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (2, 12, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), (2, 12, 6, 6)),
}


def build(algorithm: str, kind: str, **arguments: str):
    """A layer, a network on it with weights as after training, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().requires_grad_(False)
    targets = [AdapterTarget("lora_unet_layer", layer, "unet")]
    module = importlib.import_module(algorithm)
    network = module.create_network(targets, 4, 2, **({"conv_dim": "4", "conv_alpha": "2"} | arguments))
    return layer, network, torch.randn(shape)


def train_a_little(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


matrix = pytest.mark.parametrize("kind", LAYERS)
all_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


@all_algorithms
@matrix
def test_a_new_network_changes_nothing(algorithm, kind):
    layer, network, x = build(algorithm, kind)
    before = layer(x)
    network.apply_to()
    assert torch.equal(layer(x), before)


@all_algorithms
@matrix
def test_only_the_adapter_gets_gradients(algorithm, kind):
    layer, network, x = build(algorithm, kind)
    network.apply_to()
    train_a_little(network)
    layer(x).square().sum().backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@all_algorithms
@matrix
def test_merged_weights_give_the_trained_output(algorithm, kind):
    layer, network, x = build(algorithm, kind)
    train_a_little(network)
    network.apply_to()
    trained = layer(x)
    network.remove()
    assert not torch.allclose(layer(x), trained)
    network.merge()
    torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)


@all_algorithms
@matrix
def test_a_saved_network_gives_the_same_output_when_loaded(algorithm, kind, tmp_path):
    layer, network, x = build(algorithm, kind)
    train_a_little(network)
    network.apply_to()
    trained = layer(x)
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_epoch": "1"})
    network.remove()
    again = importlib.import_module(algorithm).create_network(
        [AdapterTarget("lora_unet_layer", layer, "unet")], 4, 1, conv_dim="4", conv_alpha="1"
    )
    again.load_weights(tmp_path / "a.safetensors")  # the file's alpha, 2, goes before the 1 it was built with
    again.apply_to()
    assert torch.equal(layer(x), trained)


@all_algorithms
@matrix
def test_multiplier_zero_is_off_and_a_half_is_half(algorithm, kind):
    layer, network, x = build(algorithm, kind)
    base = layer(x)
    train_a_little(network)
    network.apply_to()
    whole = layer(x) - base
    network.set_multiplier(0.5)
    torch.testing.assert_close(layer(x) - base, whole / 2, rtol=1e-4, atol=1e-5)
    network.set_multiplier(0.0)
    assert torch.equal(layer(x), base)


@all_algorithms
@matrix
def test_bf16_autocast_stays_near_fp32(algorithm, kind):
    layer, network, x = build(algorithm, kind)
    train_a_little(network)
    network.apply_to()
    exact = layer(x)
    layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.02 * exact.norm()


@all_algorithms
def test_dropouts_act_in_training_only(algorithm):
    layer, network, x = build(algorithm, "linear", rank_dropout="0.5", module_dropout="0.5", dropout="0.5")
    train_a_little(network)
    network.apply_to()
    network.train()
    assert len({tuple(layer(x).flatten().tolist()) for _ in range(8)}) > 1
    network.eval()
    assert torch.equal(layer(x), layer(x))


@all_algorithms
def test_rank_dropout_keeps_the_mean(algorithm):
    layer, network, x = build(algorithm, "conv3x3", rank_dropout="0.5")
    train_a_little(network)
    base = layer(x)
    network.apply_to()
    whole = layer(x).sub(base) if not network.eval().training else None
    network.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(dim=0) - base
    assert (mean - whole).norm() < 0.1 * whole.norm()


def test_param_groups_follow_learning_rates_and_names():
    layers = {"lora_te_a": ("te", nn.Linear(4, 4)), "lora_unet_b": ("unet", nn.Linear(4, 4))}
    targets = [AdapterTarget(name, layer, part) for name, (part, layer) in layers.items()]
    lora = importlib.import_module("networks.lora")
    groups = lora.create_network(targets, 2, 1).param_groups(1e-5, 1e-4)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [("textencoder", 1e-5, 2), ("unet", 1e-4, 2)]
    assert [g["name"] for g in lora.create_network(targets, 2, 1).param_groups(0.0, 1e-4)] == ["unet"]
    groups = lora.create_network(targets, 2, 1, loraplus_lr_ratio="16").param_groups(1e-5, 1e-4)
    assert [g["name"] for g in groups] == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert groups[1]["lr"] == pytest.approx(16e-5) and groups[1]["params"][0].shape == (4, 2)


@all_algorithms
def test_an_unknown_argument_is_named_with_the_nearest(algorithm):
    with pytest.raises(UserError, match="conv_dimm.*conv_dim"):
        build(algorithm, "linear", conv_dimm="4")


def test_a_file_of_another_rank_is_refused(tmp_path):
    _, network, _ = build("networks.lora", "linear")
    network.save_weights(tmp_path / "a.safetensors", None, None)
    lora = importlib.import_module("networks.lora")
    other = lora.create_network([AdapterTarget("lora_unet_layer", nn.Linear(12, 8), "unet")], 8, 1)
    with pytest.raises(UserError, match="other ranks"):
        other.load_weights(tmp_path / "a.safetensors")


def test_diverged_weights_are_noticed_when_a_file_is_read_back(tmp_path):
    _, network, _ = build("networks.lora", "linear")
    next(network.parameters()).data.fill_(float("nan"))
    network.save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match="not finite"):
        network.check_saved(tmp_path / "a.safetensors")
