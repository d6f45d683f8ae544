"""--deterministic: two runs give the same bits, and what cannot is an error."""

import os

import pytest
import torch

from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from library.training.deterministic import same_bits
from tests import tiny
from tests.results import weights_equal
from train_network import train


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_runs_give_the_same_bits(num_threads, tiny_folder, pictures, tmp_path):
    torch.set_num_threads(num_threads)
    options = dict(deterministic=True, train_batch_size=2, shuffle_caption=True, network_dropout=0.1, color_aug=True)
    for name in ("one", "two"):
        torch.rand(7)  # whatever drew before
        train(tiny.arguments(tiny_folder, pictures, tmp_path / name, cache_latents=False, **options))
    assert weights_equal(tmp_path / "one" / "lora.safetensors", tmp_path / "two" / "lora.safetensors")


def test_what_has_no_deterministic_algorithm_is_a_mistake_and_the_mode_ends_with_the_run(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    sentence = "--deterministic: torch has no algorithm for put_ that"
    with pytest.raises(UserError, match=sentence), same_bits(TrainNetworkOptions(deterministic=True)):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^size$"), same_bits(TrainNetworkOptions(deterministic=True)):
        raise RuntimeError("size")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (dict(seed=None), "--deterministic needs --seed"),
        (dict(xformers=True), "--deterministic does not go with --xformers"),
        (dict(torch_compile=True), "--deterministic does not go with --torch_compile"),
    ],
)
def test_what_would_give_other_bits_is_a_mistake(given, problem, tiny_file, pictures, tmp_path):
    with pytest.raises(UserError, match=problem):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", deterministic=True, **given))
