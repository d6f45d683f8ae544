"""Every network of our own, that of CONTRIBUTING.md, and every way in which LoRA begins, through the whole script."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from tests import tiny
from tests.algorithms import ALGORITHMS, SHOWN, everything, has_files, takes
from tests.results import weights_equal
from train_network import train

MORE_ARGUMENTS = {"networks.lora_fa": ["rank_dropout=0.1"], "networks.dylora": ["unit=2"]}


def options_of(algorithm: str) -> dict:
    """Those of a run with the algorithm on all kinds of layers."""
    given = [*(f"{name}={value}" for name, value in everything(algorithm).items()), *MORE_ARGUMENTS.get(algorithm, ())]
    rank = 4 if takes(algorithm, network_dim=4) else None
    return dict(network_module=algorithm, network_args=given, network_dim=rank, gradient_checkpointing=True)


RUNS = {
    **{algorithm: options_of(algorithm) for algorithm in ALGORITHMS},
    "oft of lycoris": dict(
        network_module="networks.oft", network_alpha=1e-4, network_args=["names=lycoris", "enable_all_linear=True"]
    ),
    "pissa": dict(network_args=["init=pissa", "conv_dim=2"]),
    "norms and biases": dict(network_args=["init=orthogonal", "rslora=True", "train_norm=True", "train_bias=True"]),
    "ggpo": dict(
        network_args=["ggpo_sigma=0.1", "ggpo_beta=0.1", "conv_dim=2"],
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        max_train_epochs=4,
    ),
    "by name": dict(network_args=["network_reg_dims=attn2=2,ff=0", "network_reg_lrs=attn2=0.01"]),
}

OFTEN = ("networks.lora_fa", "networks.dylora", SHOWN)


def with_slow(algorithms: Iterable[str]) -> list[Any]:
    """Of these, the runs of all but some are for the slow tests."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in algorithms]


@pytest.mark.parametrize("name", [*with_slow(ALGORITHMS), "oft of lycoris", "pissa", "norms and biases", "ggpo"])
def test_a_resumed_run_of_every_network_ends_in_the_same_bits(name, tiny_folder, pictures, tmp_path):
    common = dict(max_train_epochs=None, max_train_steps=6, save_every_n_steps=3, learning_rate=0.01) | RUNS[name]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny.arguments(tiny_folder, pictures, whole, save_state=True, **common))
    state = whole / "lora-step00000003-state"
    train(tiny.arguments(tiny_folder, pictures, resumed, resume=state, **common))
    assert weights_equal(whole / "lora.safetensors", resumed / "lora.safetensors")
    assert not weights_equal(whole / "lora.safetensors", whole / "lora-step00000003.safetensors")


@pytest.mark.parametrize("name", [*with_slow(filter(has_files, ALGORITHMS)), "norms and biases", "by name"])
def test_every_network_of_sdxl_goes_on_from_its_file_alone(name, tiny_sdxl_file, pictures, tmp_path):
    options, short = RUNS[name], dict(max_train_epochs=None, max_train_steps=2)
    train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / "first", learning_rate=0.01, **options, **short))
    first = tmp_path / "first" / "lora.safetensors"
    train(
        tiny.arguments(
            tiny_sdxl_file, pictures, tmp_path / "second", network_dim=None, network_weights=first,
            dim_from_weights=True, learning_rate=1e-30, network_module=options.get("network_module"), **short,
        )
    )  # fmt: skip
    before, after = load_file(first), load_file(tmp_path / "second" / "lora.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key].float(), after[key].float(), atol=1e-6) for key in before)


MISTAKES = {
    "--network_dim: networks.ia3 has nothing": dict(network_module=SHOWN),
    "networks.ia3 has no argument conv; it takes enable_conv": dict(
        network_module=SHOWN, network_dim=None, network_args=["conv=True"]
    ),
    "networks.oft has no dropout": dict(network_module="networks.oft", network_dropout=0.1),
    "networks.oft turns weights": dict(network_module="networks.oft", scale_weight_norms=1.0),
    "unit=3 must divide --network_dim, which is 4": dict(network_module="networks.dylora", network_args=["unit=3"]),
    "conv_dim=8 must be --network_dim, 4": dict(network_module="networks.dylora", network_args=["conv_dim=8"]),
    "init must be kaiming or orthogonal or pissa, got 'svd'": dict(network_args=["init=svd"]),
    "enable_conv must be True or False, got 'maybe'": dict(
        network_module="networks.oft", network_args=["enable_conv=maybe"]
    ),
    "network_reg_dims must be expression=rank, several separated by commas": dict(
        network_args=["network_reg_dims=attn2"]
    ),
    "--network_args: ggpo_sigma needs ggpo_beta": dict(network_args=["ggpo_sigma=0.03"]),
    "--network_args: ggpo_beta needs ggpo_sigma": dict(network_args=["ggpo_beta=0.03"]),
    "ggpo_beta must be 0 or a larger number, got -0.01": dict(network_args=["ggpo_sigma=0.03", "ggpo_beta=-0.01"]),
    "ggpo_sigma must be 0 or a larger number, got nan": dict(network_args=["ggpo_sigma=nan", "ggpo_beta=0"]),
    "--network_args: ggpo_sigma: not with dora=True": dict(
        network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01", "dora=True"]
    ),
    "--torch_compile: not with --network_args ggpo_sigma": dict(
        network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01"], torch_compile=True
    ),
    "--scale_weight_norms: not with --network_args init=pissa": dict(
        network_args=["init=pissa"], scale_weight_norms=1.0
    ),
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_what_a_network_cannot_take_is_said_before_the_model_is_loaded(sentence, tiny_file, pictures, tmp_path):
    with pytest.raises(UserError) as raised:
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **MISTAKES[sentence]))
    assert sentence in str(raised.value)
