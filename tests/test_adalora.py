"""AdaLoRA: importance, schedule and choice as peft computes them, and files that are plain LoRA of the ranks left."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.preflight import preflight
from networks import adalora, lora
from networks.adalora import AdaLoraNetwork
from networks.adalora_arguments import Schedule, check_arguments, check_ranks, schedule
from networks.orthogonality import Orthogonality
from tests import tiny
from tests.results import weights_equal
from train_network import train

STEPS = 14
ARGUMENTS = {"init_rank": "6", "t_init": "2", "t_final": "4", "delta_t": "2"}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 10), nn.Linear(10, 9)).requires_grad_(False)


def network_on(model: nn.Sequential, alpha: float = 4, **more: str) -> AdaLoraNetwork:
    targets = [AdapterTarget(f"lora_unet_{i}", layer, "unet") for i, layer in enumerate(model)]
    network = adalora.create_network(targets, 4, alpha, **(ARGUMENTS | more))
    network.training_begins(STEPS, 0)
    return network


def test_importance_choice_and_schedule_are_pefts():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=2, tfinal=4, deltaT=2, total_step=STEPS, target_modules=["0", "1", "2"]
    )
    model = layers()
    theirs = peft.get_peft_model(layers(), config)
    network = network_on(model)
    pairs = []
    for index, adapter in enumerate(network.adapters()):
        other = theirs.base_model.model[index]
        parts = other.lora_B["default"], other.lora_E["default"], other.lora_A["default"]
        pairs += zip((adapter.lora_up.weight, adapter.lora_lambda, adapter.lora_down.weight), parts, strict=True)
    counts = set()
    for step in range(1, STEPS + 1):
        for ours, other in pairs:
            ours.data.normal_()
            ours.grad = torch.randn_like(ours)
            other.data.copy_(ours.data.view_as(other))
            other.grad = ours.grad.view_as(other)
        allocator = theirs.base_model.rankallocator
        if step == STEPS - 4:
            allocator.reset_ipt = lambda: None  # the averages are compared below
        theirs.base_model.update_and_allocate(step)
        network.weights_updated(True)
        lambdas = [(adapter.lora_lambda * adapter.kept).detach() for adapter in network.adapters()]
        wanted = [theirs.base_model.model[index].lora_E["default"].detach().flatten() for index in range(3)]
        assert all(map(torch.equal, lambdas, wanted)), step
        counts.add(sum(int(value.count_nonzero()) for value in lambdas))
        names = {id(value): name.removeprefix("model.") for name, value in theirs.base_model.named_parameters()}
        for number, (_, other) in enumerate(pairs):
            for mine, averages in (
                (network.importance.sensitivities, allocator.exp_avg_ipt),
                (network.importance.uncertainties, allocator.exp_avg_unc),
            ):
                torch.testing.assert_close(mine[number].flatten(), averages[names[id(other)]].flatten())
    assert max(counts) == 18 and min(counts) == 12 and len(counts) > 2
    assert len(network.file_weights()) == 9  # all layers have something left


def test_a_step_that_was_skipped_counts_for_nothing():
    network = network_on(layers())
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    network.weights_updated(False)
    assert network.importance.step == 1
    assert not any(value.any() for value in network.importance.sensitivities)


def test_the_budget_falls_as_a_cube_and_stays_at_the_end():
    plan = Schedule(first=60, last=40, begin=10, end=50, every=5)
    assert [plan.budget(step) for step in (1, 10, 20, 30, 50, 70)] == [60, 60, 48, 42, 40, 40]
    assert [step for step in range(71) if plan.decides(step)] == [15, 20, 25, 30, 35, 40, 45, 50]
    assert schedule({}, 60, 40, 1000) == Schedule(60, 40, 100, 600, 10)
    with pytest.raises(UserError, match="t_init .600 steps. and t_final .400 steps. none of the 1000 steps"):
        schedule({"t_init": 600}, 60, 40, 1000)


def test_the_penalty_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    matrices = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (5, 2, 7)]
    ours = Orthogonality.apply(*matrices)
    wanted = sum((m @ m.T - torch.eye(3)).square().sum() for m in matrices)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(3 * value, matrices) for value in (ours, wanted)]
    for mine, formula in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, formula, rtol=1e-5, atol=1e-5)


def test_a_new_network_has_no_penalty_and_without_a_weight_there_is_none():
    network = network_on(layers())
    assert network.penalty().item() < 1e-9
    assert network_on(layers(), orthogonality="0").penalty() is None


def test_a_file_of_fewer_ranks_is_a_plain_lora_that_goes_on(tmp_path):
    model, x = layers(), torch.randn(5, 12)
    network = network_on(model)
    network.apply_to()
    for adapter in network.adapters():
        adapter.lora_lambda.data.normal_()
        adapter.kept[1::2] = 0
    network.adapters()[1].kept.zero_()
    trained = model(x)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.remove()
    file = load_file(tmp_path / "a.safetensors")
    assert len(file) == 6 and file["lora_unet_0.lora_down.weight"].shape == (3, 12)
    targets = [AdapterTarget(f"lora_unet_{i}", layer, "unet") for i, layer in enumerate(model)]
    plain = lora.create_network_from_weights(targets, tmp_path / "a.safetensors")
    plain.apply_to()
    torch.testing.assert_close(model(x), trained)
    plain.remove()
    for alpha in (4, 3):
        again = network_on(model, alpha)
        again.load_weights(tmp_path / "a.safetensors")
        again.apply_to()
        torch.testing.assert_close(model(x), trained)
        again.remove()
        columns = again.adapters()[0].lora_up.weight.norm(dim=0)
        assert (columns > 0.7).all() and (columns < 1.5).all()
        assert {value.item() for key, value in again.file_weights().items() if key.endswith("alpha")} == {alpha}


WORDS = dict(
    network_module="networks.adalora", network_args=["t_init=1", "t_final=2", "delta_t=2", "conv_dim=2"],
    max_train_epochs=None, max_train_steps=8, network_dim=4, network_alpha=4, learning_rate=1e-3,
)  # fmt: skip


def test_a_run_ends_at_its_budget_goes_on_to_the_bit_and_is_drawn_by_others(tiny_file, pictures, tmp_path):
    words = WORDS | dict(save_state=True, save_every_n_steps=3)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "whole", **words))
    whole = tmp_path / "whole" / "lora.safetensors"
    state = tmp_path / "whole" / "lora-step00000003-state"
    train(tiny.arguments(tiny_file, pictures, tmp_path / "rest", resume=state, **words))
    assert weights_equal(whole, tmp_path / "rest" / "lora.safetensors")
    file, state = load_file(whole), load_file(state / "model.safetensors")
    downs, first = ({n: v for n, v in x.items() if n.endswith("lora_down.weight")} for x in (file, state))
    assert sum(map(len, downs.values())) == sum(2 if value.shape[2:] == (3, 3) else 4 for value in first.values())
    assert len({len(value) for value in downs.values()}) > 1
    plain = WORDS | dict(
        network_module="networks.lora", network_args=None, dim_from_weights=True, network_weights=whole
    )
    train(tiny.arguments(tiny_file, pictures, tmp_path / "plain", **plain))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"t_initt": "4"}, "t_initt; did you mean t_init"),
        ({"delta_t": "0"}, "delta_t must be 1 or more, got 0"),
        ({"beta1": "1"}, "beta1 must be above 0 and below 1"),
        ({"conv_alpha": "1"}, "conv_alpha needs conv_dim"),
    ],
)
def test_mistakes_are_sentences(given, problem):
    with pytest.raises(UserError, match=problem):
        check_arguments(given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(network_args=["t_init=6", "t_final=2"]), "t_init .6 steps. and t_final .2 steps. none of the 8 steps"),
        (
            dict(dim_from_weights=True),
            "--dim_from_weights: not with networks.adalora, .* networks.lora to",
        ),
    ],
)
def test_what_cannot_be_done_is_said_without_torch(options, problem, tiny_file, pictures, tmp_path):
    weights = tmp_path / "a.safetensors"
    lora.create_network([AdapterTarget("lora_unet_0", nn.Linear(12, 8), "unet")], 4, 4).save_weights(
        weights, None, None
    )
    more = dict(network_weights=weights) if "dim_from_weights" in options else {}
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", **(WORDS | options | more))
    options = read_options(TrainNetworkOptions, arguments)
    with pytest.raises(UserError, match=problem):
        preflight(options)


def test_a_file_of_more_ranks_than_there_are_is_refused():
    shapes = {"lora_unet_a.lora_down.weight": (9, 12)}
    check_ranks(shapes, "a.safetensors", 6, {})
    with pytest.raises(UserError, match="ranks up to 9, and this network begins with 6; .* init_rank=9"):
        check_ranks(shapes, "a.safetensors", 4, {})
