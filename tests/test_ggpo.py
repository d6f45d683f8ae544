"""LoRA-GGPO disturbs weights as its formula says, with the gradients at the disturbed weights, while training alone."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import hold_in_nf4
from library.options.derived import has_dropout
from library.options.groups import TrainNetworkOptions
from library.training.resuming import MORE_FILE
from networks import lora
from networks.ggpo import drawn
from networks.lora_adapter import LoraNetwork
from tests import tiny
from train_network import train

SIGMA, BETA = 0.3, 2.0
LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), (2, 5, 16)),
    "conv1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 6, 6)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def on_model(model: nn.Module, reads: str | None = None, **arguments: str) -> LoraNetwork:
    """An attached network in training, with A and B as in the middle of it."""
    model.requires_grad_(False)
    targets = [AdapterTarget(f"lora_unet_{i}", layer, "unet", input=reads) for i, layer in enumerate(model)]
    known = {"conv_dim": "4", "conv_alpha": "2", "ggpo_sigma": str(SIGMA), "ggpo_beta": str(BETA)}
    network = lora.create_network(targets, 4, 2, **(known | arguments))
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.train().training_begins(10, 0)
    return network


def with_weight(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def change_of(adapter: nn.Module, down: Tensor, up: Tensor) -> Tensor:
    return adapter.scale * (up.flatten(1) @ down.flatten(1)).view(adapter.base.weight.shape)


def next_seed() -> int:
    """Of the next pass, with the generator as it is now."""
    state = torch.get_rng_state()
    seed = torch.randint(2**62, ()).item()
    torch.set_rng_state(state)
    return seed


def next_change(adapter: nn.Module) -> Tensor:
    """What the next pass adds to the weight."""
    return drawn(adapter.base, adapter.perturbation.spread, next_seed(), torch.float32)


@layers
@pytest.mark.parametrize("begins", ["kaiming", "pissa"])
def test_rows_are_disturbed_as_much_as_the_formula_says(kind, begins):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    network = on_model(model, init=begins)
    (adapter,) = network.adapters()
    undisturbed = model(torch.ones(shape))
    assert torch.equal(undisturbed, model(torch.ones(shape)))  # before there is a gradient
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    network.weights_updated(True)

    (down, up), weight = (adapter.lora_down.weight, adapter.lora_up.weight), adapter.base.weight.flatten(1)
    gradient = change_of(adapter, down.grad, up).flatten(1) + change_of(adapter, down, up.grad).flatten(1)
    change = adapter.delta_weight().flatten(1)
    squares = (weight.square() + change.square() + BETA * gradient.square()).sum(1)
    wanted = SIGMA * (squares / weight.shape[1]).sqrt()
    torch.testing.assert_close(adapter.perturbation.spread, wanted, rtol=1e-4, atol=1e-6)
    drawn_often = torch.stack([drawn(adapter.base, wanted, seed, torch.float32).flatten(1) for seed in range(2000)])
    assert (drawn_often.mean((0, 2)).abs() < 0.05 * wanted).all()
    torch.testing.assert_close(drawn_often.std((0, 2)), wanted, rtol=0.05, atol=0)
    assert not torch.equal(model(torch.ones(shape)), undisturbed)


@layers
@pytest.mark.parametrize("is_flat", [True, False])
def test_output_and_gradients_are_those_at_the_disturbed_weight(kind, is_flat):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(make()), torch.randn(shape)
    network = on_model(model)
    (adapter,) = network.adapters()
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    adapter.perturbation.spread = torch.rand(24)
    if is_flat:
        network.flatten([{"params": list(network.parameters())}], torch.float32)
    copies = [value.detach().clone().requires_grad_() for value in (down, up, x)]
    disturbed = model[0].weight + change_of(adapter, *copies[:2]) + next_change(adapter)
    expected, x = with_weight(model[0], disturbed, copies[2]), x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        output = model(x)
    assert model[0].weight.shape not in [value.shape for value in kept if value is not model[0].weight]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(output)
    for result in (output, expected):
        (result * weights).sum().backward()
    of_network = [span.of(network.flat.gradients) for span in network.flat.spans] if is_flat else [down.grad, up.grad]
    for ours, theirs in zip([*of_network, x.grad], copies, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-4)


def test_layers_that_read_one_tensor_together_are_disturbed_each_for_itself():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.randn(2, 5, 16)
    network = on_model(model, reads="one")
    network.flatten([{"params": list(network.parameters())}], torch.float32)
    adapters = network.adapters()
    assert all(adapter.shared for adapter in adapters)
    for adapter in adapters:
        adapter.perturbation.spread = torch.rand(16)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    changes = []
    outputs = []
    for adapter, layer in zip(adapters, model, strict=True):
        changes.append(next_change(adapter))
        outputs.append(layer(ours))
    for adapter, layer, change, output in zip(adapters, model, changes, outputs, strict=True):
        expected = with_weight(layer, layer.weight + adapter.delta_weight().detach() + change, theirs)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
    sum(output.square().sum() for output in outputs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hold", [None, hold_in_fp8, hold_in_int8, hold_in_nf4])
def test_a_base_of_fewer_bits_is_disturbed_by_its_own_norms(hold, autocast):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False), torch.randn(2, 20, 64)
    if hold:
        hold(model)
    network = on_model(model, ggpo_beta="0")
    (adapter,) = network.adapters()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(x)
        before.float().square().sum().backward()
        network.weights_updated(True)
        changed = (model[0].weight.square() + adapter.delta_weight().square()).sum(1)
        torch.testing.assert_close(adapter.perturbation.spread, SIGMA * (changed / 64).sqrt(), rtol=1e-2, atol=0)
        change = next_change(adapter)
        difference = model(x) - before
    assert difference.dtype == before.dtype
    if not autocast:
        torch.testing.assert_close(difference, x @ change.T, rtol=1e-3, atol=1e-3)


def test_nothing_is_disturbed_outside_of_training_nor_with_the_network_off():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 24)), torch.randn(3, 16)
    network = on_model(model)
    (adapter,) = network.adapters()
    adapter.perturbation.spread = torch.ones(24)
    trained = with_weight(model[0], model[0].weight + adapter.delta_weight(), x)
    assert not torch.allclose(model(x), trained, atol=0.1)
    network.set_multiplier(0.0)
    assert torch.equal(model(x), with_weight(model[0], model[0].weight, x))
    network.set_multiplier(1.0)
    network.eval()
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    assert set(network.file_weights()) == {
        f"lora_unet_0.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    network.remove()
    network.merge()
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


def test_a_step_that_was_not_taken_and_a_layer_without_gradients_change_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 24))
    network = on_model(model)
    first, second = network.adapters()
    for parameter in first.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    network.weights_updated(torch.tensor(False))
    assert not first.perturbation.spread.any() and second.perturbation.spread is None
    network.weights_updated(False)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    network.weights_updated(torch.tensor(True))
    before = first.perturbation.spread.clone(), second.perturbation.spread.clone()
    assert before[0].min() > 0.01
    for parameter in network.parameters():
        parameter.grad = None if parameter is first.lora_up.weight else torch.full_like(parameter, torch.nan)
    network.weights_updated(torch.tensor(False))
    assert torch.equal(first.perturbation.spread, before[0]) and torch.equal(second.perturbation.spread, before[1])

    (kept,) = network.kept().values()
    again = on_model(nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 24)))
    (other,) = again.kept().values()
    other.load_state_dict(kept.state_dict())
    assert all(map(torch.equal, before, (adapter.perturbation.spread for adapter in again.adapters())))


def test_blocks_that_run_again_in_their_backward_pass_are_disturbed_as_before(tiny_folder, pictures, tmp_path):
    """With --gradient_checkpointing; and other perturbations than none make another network."""

    def trained(name: str, *given: str, **more) -> dict[str, Tensor]:
        network_args = ["conv_dim=2", *given]
        options = dict(max_train_epochs=1, learning_rate=0.01, network_args=network_args) | more
        train(tiny.arguments(tiny_folder, pictures, tmp_path / name, **options))
        return load_file(tmp_path / name / "lora.safetensors")

    ggpo = "ggpo_sigma=0.3", "ggpo_beta=0.1"
    usual, repeated, without = (
        trained("usual", *ggpo), trained("repeated", *ggpo, gradient_checkpointing=True), trained("without"),
    )  # fmt: skip
    assert all(torch.allclose(usual[name].float(), value.float(), atol=1e-5) for name, value in repeated.items())
    assert not all(torch.allclose(usual[name].float(), value.float(), atol=1e-3) for name, value in without.items())


def test_layers_that_are_not_trained_are_not_disturbed(tiny_folder, pictures, tmp_path):
    arguments = tiny.arguments(
        tiny_folder, pictures, tmp_path, max_train_epochs=1, unet_lr=0, text_encoder_lr=[0.01], save_state=True,
        save_every_n_steps=2, network_args=["ggpo_sigma=0.3", "ggpo_beta=0.1"],
    )  # fmt: skip
    train(arguments)
    (state,) = torch.load(tmp_path / "lora-step00000002-state" / MORE_FILE).values()
    assert state["spreads"] and all(name.startswith("lora_te_") for name in state["spreads"])


def test_a_layer_of_dora_in_a_file_cannot_be_disturbed(tmp_path):
    target = AdapterTarget("lora_unet_0", nn.Linear(16, 24).requires_grad_(False), "unet")
    lora.create_network([target], 4, 2, dora="True").save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match="a.safetensors: lora_unet_0: a layer of DoRA, which .* ggpo_sigma is not for"):
        lora.create_network_from_weights([target], tmp_path / "a.safetensors", ggpo_sigma="0.1", ggpo_beta="0")


def test_recordings_and_repeated_blocks_know_of_the_random_numbers():
    assert has_dropout(TrainNetworkOptions(network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01"]))
    assert not has_dropout(TrainNetworkOptions(network_args=["ggpo_sigma=0", "ggpo_beta=0"]))
