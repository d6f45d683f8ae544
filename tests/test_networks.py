"""Every algorithm in networks/, and that of CONTRIBUTING.md, goes through one matrix of layers and checks."""

import importlib

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.training.meanwhile import Copies
from tests.algorithms import ALGORITHMS, arguments_of, everything, has_files, takes

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
    network = module.create_network(targets, 4, 2, **(everything(algorithm) | arguments))
    return layer, network, torch.randn(shape)


def algorithms_with(argument: str) -> list[str]:
    return [algorithm for algorithm in ALGORITHMS if argument in arguments_of(algorithm)]


def train_a_little(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


matrix = pytest.mark.parametrize("kind", LAYERS)
all_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
with_norms = pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if takes(name, scale_weight_norms=1.0)])


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
    for _ in range(40):  # some algorithms train a part of the parameters at a time
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
        [AdapterTarget("lora_unet_layer", layer, "unet")], 4, 1, **everything(algorithm, conv_alpha="1")
    )
    again.load_weights(tmp_path / "a.safetensors")  # the file's alpha, 2, goes before the 1 it was built with
    again.apply_to()
    tolerance = 1e-6 if algorithm == "networks.adalora" else 0  # whose file is a product of its parts
    torch.testing.assert_close(layer(x), trained, rtol=tolerance, atol=tolerance)


KINDS_OF_FILES = [(algorithm, {}) for algorithm in ALGORITHMS] + [
    ("networks.lora", {"init": "pissa"}),
    ("networks.oft", {"names": "lycoris"}),
]


@pytest.mark.parametrize(("algorithm", "arguments"), KINDS_OF_FILES)
def test_a_copy_that_training_left_behind_is_the_file_of_its_time(algorithm, arguments, tmp_path):
    _, network, _ = build(algorithm, "conv3x3", **arguments)
    train_a_little(network)
    network.save_weights(tmp_path / "a.safetensors", torch.float16, None)
    copies = Copies()
    taken = copies.take(network.live_file_weights(), torch.float16)
    train_a_little(network)
    copies.wait()
    file = load_file(tmp_path / "a.safetensors")
    assert taken.keys() == file.keys()
    assert all(torch.equal(taken[name], file[name]) and taken[name].dtype == file[name].dtype for name in file)


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


@pytest.mark.parametrize("algorithm", algorithms_with("module_dropout"))
def test_dropouts_act_in_training_only(algorithm):
    layer, network, x = build(algorithm, "linear", rank_dropout="0.5", module_dropout="0.5", dropout="0.5")
    train_a_little(network)
    network.apply_to()
    network.train()
    assert len({tuple(layer(x).flatten().tolist()) for _ in range(8)}) > 1
    network.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("algorithm", algorithms_with("rank_dropout"))
def test_rank_dropout_keeps_the_mean(algorithm):
    layer, network, x = build(algorithm, "conv3x3", rank_dropout="0.5")
    train_a_little(network)
    base = layer(x)
    network.apply_to()
    whole = layer(x).sub(base) if not network.eval().training else None
    network.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(dim=0) - base
    assert (mean - whole).norm() < 0.1 * whole.norm()


@with_norms
@matrix
def test_a_large_change_is_scaled_down_to_the_norm_and_keeps_its_direction(algorithm, kind):
    _, network, _ = build(algorithm, kind)
    train_a_little(network)
    (adapter,) = network.adapters()
    before = adapter.delta_weight().detach().clone()
    largest = before.norm().item() / 3
    logged = network.limit_norms(largest).logged()
    torch.testing.assert_close(adapter.delta_weight(), before / 3)
    assert logged["max_norm/keys_scaled"] == 1
    assert logged["max_norm/max_key_norm"] == pytest.approx(largest, rel=1e-5)
    assert logged["norm/avg_key_norm"] == pytest.approx(largest, rel=1e-5)


@with_norms
@matrix
@pytest.mark.parametrize("factor", [1.01, 1.9, 100.0])  # kohya's clamp at half of the largest norm changes nothing
def test_a_change_below_the_largest_norm_stays_as_it_is(algorithm, kind, factor):
    _, network, _ = build(algorithm, kind)
    train_a_little(network)
    (adapter,) = network.adapters()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    norm = adapter.delta_weight().norm().item()
    logged = network.limit_norms(norm * factor).logged()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert logged["max_norm/keys_scaled"] == 0
    assert logged["max_norm/max_key_norm"] == pytest.approx(norm, rel=1e-5)


@with_norms
def test_the_norm_of_a_new_network_is_0_and_is_left_alone(algorithm):
    _, network, _ = build(algorithm, "linear")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert network.limit_norms(1.0).logged()["max_norm/max_key_norm"] == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_of_several_changes_only_the_large_ones_are_scaled_and_both_factors_take_half():
    layers = [nn.Linear(6, 4), nn.Linear(6, 4)]
    targets = [AdapterTarget(f"lora_unet_{i}", layer, "unet") for i, layer in enumerate(layers)]
    network = importlib.import_module("networks.lora").create_network(targets, 2, 1)  # alpha / rank is a half
    small, large = network.adapters()
    for adapter, factor in ((small, 1.0), (large, 4.0)):
        adapter.lora_down.weight.data.copy_(torch.eye(2, 6))
        adapter.lora_up.weight.data.copy_(factor * torch.eye(4, 2))
    norms = [2**0.5 / 2, 4 * 2**0.5 / 2]
    logged = network.limit_norms(2**0.5).logged()  # the large one is twice as large as it may be
    assert logged["max_norm/keys_scaled"] == 1
    assert logged["max_norm/max_key_norm"] == pytest.approx(2**0.5)
    assert logged["norm/avg_key_norm"] == pytest.approx((norms[0] + norms[1] / 2) / 2)
    assert torch.equal(small.lora_up.weight, torch.eye(4, 2))
    torch.testing.assert_close(large.lora_down.weight, torch.eye(2, 6) / 2**0.5)
    torch.testing.assert_close(large.lora_up.weight, 4 * torch.eye(4, 2) / 2**0.5)


with_files = pytest.mark.parametrize("algorithm", [*filter(has_files, ALGORITHMS)])


@with_files
@matrix
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_network_is_made_from_its_file_alone(algorithm, kind, suffix, tmp_path):
    layer, network, x = build(algorithm, kind)
    train_a_little(network)
    network.apply_to()
    trained = layer(x)
    path = tmp_path / f"a{suffix}"
    network.save_weights(path, None, None)
    network.remove()
    other = AdapterTarget("lora_unet_other", nn.Linear(3, 3), "unet")  # is not in the file
    targets = [AdapterTarget("lora_unet_layer", layer, "unet"), other]
    again = importlib.import_module(algorithm).create_network_from_weights(targets, path)
    assert len(again.adapters()) == 1
    again.apply_to()
    assert torch.equal(layer(x), trained)


@with_files
def test_a_file_with_layers_that_the_model_has_not_is_refused(algorithm, tmp_path):
    _, network, _ = build(algorithm, "linear")
    network.save_weights(tmp_path / "a.safetensors", None, None)
    targets = [AdapterTarget("lora_unet_other", nn.Linear(12, 8), "unet")]
    with pytest.raises(UserError, match=r"this network has not: \w+_unet_layer"):
        importlib.import_module(algorithm).create_network_from_weights(targets, tmp_path / "a.safetensors")


def test_ranks_and_alphas_of_a_file_may_differ_and_without_alpha_it_is_the_rank(tmp_path):
    lora = importlib.import_module("networks.lora")
    targets = [AdapterTarget(f"lora_unet_{i}", nn.Linear(12, 8), "unet") for i in range(3)]
    weights = {
        "lora_unet_0.lora_down.weight": torch.ones(2, 12), "lora_unet_0.lora_up.weight": torch.ones(8, 2),
        "lora_unet_0.alpha": torch.tensor(3.0),
        "lora_unet_2.lora_down.weight": torch.ones(5, 12, 1, 1), "lora_unet_2.lora_up.weight": torch.ones(8, 5, 1, 1),
    }  # fmt: skip
    torch.save(weights, tmp_path / "a.pt")
    network = lora.create_network_from_weights(targets, tmp_path / "a.pt", loraplus_lr_ratio="4")
    first, last = network.adapters()
    assert (first.rank, first.scale, last.rank, last.scale) == (2, 1.5, 5, 1.0)
    assert torch.equal(last.delta_weight(), torch.full((8, 12), 5.0))
    assert [group["lr"] for group in network.param_groups(0.0, 1e-4)] == pytest.approx([1e-4, 4e-4])


def test_arguments_that_the_file_answers_itself_are_named(tmp_path, caplog):
    _, network, _ = build("networks.lora", "linear")
    network.save_weights(tmp_path / "a.safetensors", None, None)
    lora = importlib.import_module("networks.lora")
    targets = [AdapterTarget("lora_unet_layer", nn.Linear(12, 8), "unet")]
    lora.create_network_from_weights(targets, tmp_path / "a.safetensors", conv_dim="8", block_dims="1,2")
    assert "conv_dim, block_dims: no effect" in caplog.text


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
    known = next(iter(arguments_of(algorithm)))
    with pytest.raises(UserError, match=f"{known}x.*{known}"):
        build(algorithm, "linear", **{f"{known}x": "4"})


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
