"""--ema: what is saved, sampled and validated is an average of the weights, and training itself goes on as without."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.layers.flat import FlatWeights
from library.training.ema import AverageWeights
from tests import tiny
from tests.results import weights_equal
from tests.test_flat_training import groups_of, two_networks
from train_network import train


def averages_of(walk: list[list[Tensor]], decay: float) -> list[list[Tensor]]:
    """The averages after each step of a walk, in float64."""
    current, found = [value.double() for value in walk[0]], []
    for step, values in enumerate(walk[1:], start=1):
        kept = min(decay, (1 + step) / (10 + step))
        current = [kept * a + (1 - kept) * v.double() for a, v in zip(current, values, strict=True)]
        found.append(current)
    return found


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_average_is_that_of_the_formula_and_skipped_steps_leave_no_trace(is_flat):
    _, network, _, _ = two_networks()
    groups = groups_of(network)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if is_flat:
        network.flatten(groups, torch.float32)
        assert isinstance(network.flat, FlatWeights)
    average, other = (AverageWeights(parameters, network.flat, 0.3) for _ in range(2))
    walk = [[p.detach().clone() for p in parameters]]
    for _ in range(6):
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter))
        walk.append([p.detach().clone() for p in parameters])
        for taken in (True, False) if not is_flat else (torch.tensor(True), torch.tensor(False)):
            average.update(taken)
    average.average()
    for ours, wanted in zip(parameters, averages_of(walk, 0.3)[-1], strict=True):
        torch.testing.assert_close(ours.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    average.train()
    assert all(map(torch.equal, parameters, walk[-1]))
    other.load_state_dict(average.state_dict())
    assert all(map(torch.equal, other.averages, average.averages)) and other.num_steps == 6


def test_a_run_saves_the_average_of_what_its_states_have_and_trains_as_without_it(tiny_file, pictures, tmp_path):
    words = dict(max_train_epochs=None, max_train_steps=4, save_every_n_steps=1, save_state=True, learning_rate=0.01)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "plain", **words))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "ema", ema=True, ema_decay=0.25, **words))
    states = [f"lora-step{step:08d}-state/model.safetensors" for step in range(1, 5)]
    assert all(weights_equal(tmp_path / "plain" / name, tmp_path / "ema" / name) for name in states)
    files = [load_file(tmp_path / "ema" / name) for name in states]
    names = [name for name in files[0] if name.endswith("lora_up.weight")]  # 0 at the start
    walk = [[torch.zeros_like(files[0][name]) for name in names], *([file[name] for name in names] for file in files)]
    for step, wanted in enumerate(averages_of(walk, 0.25), start=1):
        saved = load_file(tmp_path / "ema" / f"lora-step{step:08d}.safetensors")
        for name, value in zip(names, wanted, strict=True):
            torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-8)


def test_a_state_without_an_average_and_a_run_without_one_are_told(tiny_file, pictures, tmp_path, capsys):
    words = dict(max_train_epochs=None, network_train_unet_only=True)
    for name, more, state in (
        ("plain", {}, None),
        ("ema", {"ema": True}, tmp_path / "plain" / "lora-state"),
        ("again", {}, tmp_path / "ema" / "lora-state"),
    ):
        words["max_train_steps"] = words.get("max_train_steps", 0) + 1
        if state:
            more = more | {"resume": state}
        train(tiny.arguments(tiny_file, pictures, tmp_path / name, save_state=True, **words, **more))
    said = capsys.readouterr().err
    assert "lacks an average of weights (--ema), which begins anew" in said
    assert "has an average of weights (--ema), which this run leaves out" in said


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"ema": True, "optimizer_type": "AdamWScheduleFree"}, "--ema does not go with .*AdamWScheduleFree"),
        ({"ema": True, "ema_decay": 1}, "--ema_decay must be at least 0 and less than 1, got 1"),
    ],
)
def test_mistakes_are_sentences(given, problem, tiny_file, pictures, tmp_path):
    with pytest.raises(UserError, match=problem):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **given))
