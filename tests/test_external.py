"""Networks of other projects train, save, load and resume: LyCORIS, and any module with kohya's create_network."""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import KohyaModels
from library.families.sd import Sd, kohya_views, sd_adapter_targets
from library.options.groups import TrainNetworkOptions
from library.preflight import check_network_module
from library.recipes.network import trained_parts
from library.recipes.network_building import build_network, load_algorithm
from library.training.sampling import draw
from networks.external import ExternalAlgorithm, ExternalNetwork
from tests import tiny
from tests.test_consumers import PROMPT, TOLERANCE, diffusers_pipeline, drawn_by
from tests.test_network_names import SD1, full_size, golden
from train_network import train

lycoris = pytest.importorskip("lycoris.kohya", reason="the package lycoris-lora is not installed")
ALGOS = ["lora", "locon", "loha", "lokr", "ia3", "dylora", "full", "diag-oft", "boft", "glora"]
WITHOUT_FILES = ["ia3", "dylora"]  # of which LyCORIS makes no network: it fails, or ends in another algorithm
ADDED_BY_FULL = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")  # what kohya leaves alone
NAME = "lycoris.kohya"


@pytest.fixture
def build(tiny_folder):
    """A family and a network on it; every call loads the model anew."""

    def make(arguments: dict[str, str] | None = None, **options: object) -> tuple[Sd, ExternalNetwork]:
        torch.manual_seed(0)
        values = {"network_dim": 4, "network_alpha": 2} | options
        read = TrainNetworkOptions(pretrained_model_name_or_path=str(tiny_folder), **values)
        family = Sd(read, torch.device("cpu"), torch.float32)
        algorithm = load_algorithm(read.network_module or NAME)
        algorithm.check_arguments(arguments or {})
        return family, build_network(algorithm, family, read, arguments or {})

    return make


@torch.no_grad()
def answer(family: Sd) -> Tensor:
    """What U-Net and text encoder say of a fixed input; DyLoRA draws its rank with `random`."""
    random.seed(0)
    torch.manual_seed(0)
    conds = {"hidden": family.encode_text(["a cat"])}
    return family.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), conds, None)


def train_a_little(network: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))


def arguments(tiny_file: Path, pictures: Path, output: Path, *network_args: str, **more: object) -> list[str]:
    short = dict(network_module=NAME, network_args=list(network_args) or None, max_train_epochs=None, max_train_steps=2)
    return tiny.arguments(tiny_file, pictures, output, **short | more)


def layers_of(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def kohyas_layers(family: Sd) -> set[str]:
    return {target.name for target in sd_adapter_targets(family.text_encoder, family.unet, conv=True)}


@pytest.mark.parametrize("algo", ALGOS)
def test_two_steps_train_and_the_file_has_kohyas_names(algo, tiny_file, pictures, tmp_path, build):
    train(arguments(tiny_file, pictures, tmp_path / "out", f"algo={algo}", gradient_checkpointing=True))
    path = tmp_path / "out" / "lora.safetensors"
    weights = load_file(path)
    untrained = build({"algo": algo}, network_alpha=1)[1]._own_file(tmp_path, {})[0]
    assert weights.keys() == untrained.keys()
    added = {f"lora_unet_{name}" for name in ADDED_BY_FULL}
    assert layers_of(weights) == kohyas_layers(build()[0]) | added
    changed = layers_of(name for name in weights if not torch.equal(weights[name], untrained[name]))
    assert any(name.startswith("lora_te_text_model_") for name in changed), "the text encoder is trained"
    assert len(changed) > 0.9 * len(layers_of(weights))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == NAME and metadata["ss_steps"] == "2" and metadata["sshs_model_hash"]


@pytest.mark.parametrize("algo", ALGOS)
def test_a_new_network_changes_nothing_and_multiplier_zero_is_off(algo, build, tiny_folder):
    family, network = build({"algo": algo})
    plain = Sd(TrainNetworkOptions(pretrained_model_name_or_path=str(tiny_folder)), torch.device("cpu"), torch.float32)
    before = answer(plain)
    torch.testing.assert_close(answer(family), before, rtol=1e-4, atol=1e-5)
    train_a_little(network)
    assert (answer(family) - before).norm() > 0.01 * before.norm()
    network.set_multiplier(0.0)
    torch.testing.assert_close(answer(family), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("from_weights", [False, True])
@pytest.mark.parametrize("algo", ALGOS)
def test_a_saved_network_answers_the_same_when_loaded(algo, from_weights, build, tmp_path):
    if from_weights and algo in WITHOUT_FILES:
        pytest.skip("LyCORIS makes no such network from its file")
    family, network = build({"algo": algo})
    train_a_little(network.eval())
    trained, path = answer(family), tmp_path / "网络 1.safetensors"
    network.save_weights(path, None, {"ss_epoch": "1"})
    assert network.check_saved(path) == len(layers_of(load_file(path)))
    again, loaded = build({} if from_weights else {"algo": algo}, network_weights=str(path), dim_from_weights=from_weights)
    loaded.eval()
    torch.testing.assert_close(answer(again), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_resumed_run_ends_in_the_same_bits(algo, tiny_file, pictures, tmp_path):
    common = dict(max_train_steps=4, scale_weight_norms=0.01) if algo == "lokr" else dict(max_train_steps=4)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(arguments(tiny_file, pictures, whole, f"algo={algo}", save_every_n_steps=2, save_state=True, **common))
    state = whole / "lora-step00000002-state"
    train(arguments(tiny_file, pictures, resumed, f"algo={algo}", resume=state, **common))
    ours, theirs = (load_file(folder / "lora.safetensors") for folder in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_of_a_full_size_model_are_those_of_kohyas_networks():
    text_encoder, unet = kohya_views(*full_size(*SD1))
    options = TrainNetworkOptions(network_dim=1)
    network = ExternalAlgorithm(lycoris).network_on_models(KohyaModels(None, text_encoder, unet), options, {})
    added = {f"lora_unet_{name}" for name in ADDED_BY_FULL}
    assert layers_of(network.network.state_dict()) == layers_of(golden("sd15_conv")) | added


PRESET = """
enable_conv = false
unet_target_module = ["Transformer2DModel"]
text_encoder_target_module = []

[module_algo_map.FeedForward]
algo = "lokr"
factor = 4
"""


def test_presets_choose_layers_and_are_gone_for_the_next_network(build, tmp_path):
    family, network = build({"preset": "attn-mlp"})
    transformers = {target.name for target in sd_adapter_targets(family.text_encoder, family.unet, conv=False)}
    assert layers_of(network.network.state_dict()) == transformers
    assert layers_of(build({"preset": "attn-only"})[1].network.state_dict()) == {
        name for name in transformers if "attn" in name
    }
    path = tmp_path / "预设 1.toml"
    path.write_text(PRESET, encoding="utf-8")
    weights = build({"preset": str(path), "algo": "loha"})[1].network.state_dict()
    assert layers_of(weights) == {name for name in transformers if name.startswith("lora_unet_")}
    assert all(("_ff_" in name) == ("lokr" in name) for name in weights if not name.endswith("alpha"))
    assert not any("lokr" in name for name in build()[1].network.state_dict())


def test_a_preset_that_names_no_layers_is_refused(build):
    with pytest.raises(UserError, match="no layers.*a preset that names none"):
        build({"algo": "ia3", "preset": "ia3"}, network_train_unet_only=True)


def test_learning_rates_and_parts_are_those_of_the_table(build):
    _, network = build({"loraplus_lr_ratio": "4"})
    groups = network.param_groups(1e-5, 1e-4)
    assert [group["name"] for group in groups] == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 4e-5, 1e-4, 4e-4])
    text, unet = trained_parts(network, groups)
    assert (text.num_modules, text.learning_rates, unet.learning_rates) == (18, [1e-5], [1e-4])
    total = sum(parameter.numel() for parameter in network.parameters())
    assert text.num_parameters + unet.num_parameters == total

    groups = network.param_groups(0.0, 1e-4)
    assert [group["name"] for group in groups] == ["unet", "unet plus"]
    trained = {name.split("_")[1] for name, p in network.network.named_parameters() if p.requires_grad}
    assert trained == {"unet"}
    assert trained_parts(network, groups)[0].learning_rates == []


def test_unet_only_leaves_the_text_encoder_out_of_the_file(tiny_file, pictures, tmp_path):
    train(arguments(tiny_file, pictures, tmp_path / "out", network_train_unet_only=True, save_precision="fp16"))
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    assert {name.split("_")[1] for name in weights} == {"unet"}
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_limited_norms_are_logged_and_stay_over_a_save(build):
    _, network = build({"algo": "loha"})
    train_a_little(network)
    logged = network.limit_norms(0.001).logged()
    assert logged["max_norm/keys_scaled"] == 139 and logged["max_norm/max_key_norm"] == pytest.approx(0.001, rel=1e-3)
    assert network.limit_norms(0.0011).logged()["max_norm/keys_scaled"] == 0


def test_another_alpha_in_a_file_is_refused(build, tmp_path):
    build()[1].save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match=r"alpha is 2 in .*a\.safetensors and 4 here; give --network_alpha"):
        build(network_alpha=4, network_weights=str(tmp_path / "a.safetensors"))


def test_a_file_of_another_algorithm_is_refused(build, tmp_path):
    build()[1].save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match="a.safetensors has 278 weights that this network has not"):
        build({"algo": "loha"}, network_weights=str(tmp_path / "a.safetensors"))


@pytest.fixture
def restored_models() -> Iterator[None]:
    """diffusers' loader puts adapters into the shared toy models; take them out again."""
    yield
    tiny.forget_models()


def test_diffusers_draws_the_same_pictures_with_a_file_of_lycoris_lora(build, tmp_path, restored_models):
    arguments = {"algo": "lora", "preset": "attn-mlp"}
    family, network = build(arguments)
    train_a_little(network.eval())
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_epoch": "1"})
    pipeline: StableDiffusionPipeline = diffusers_pipeline(family, "sd1")
    without = drawn_by(pipeline, PROMPT)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    theirs, ours = drawn_by(pipeline, PROMPT), np.asarray(draw(family, PROMPT, "ddim"), dtype=int)
    assert abs(theirs - without).max() > 10 * TOLERANCE, "the network must be seen in the picture"
    assert abs(theirs - ours).max() <= TOLERANCE
