"""Where flags and files tell different things of the base model, one sentence says so, and nothing stops."""

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.families.agreement import check_clip_skip, folder_predicts_v, model_warnings, num_text_layers
from library.families.detect import CheckpointInfo, inspect_checkpoint
from library.options.groups import ModelOptions, TrainNetworkOptions
from tests import tiny


def warnings(checkpoint: CheckpointInfo, **options: object) -> list[str]:
    given = TrainNetworkOptions(pretrained_model_name_or_path=str(checkpoint.path), **options)
    return model_warnings(given, checkpoint)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def checkpoint(request, tmp_path) -> CheckpointInfo:
    return CheckpointInfo(tmp_path / "model.safetensors", request.param, is_folder=False)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "folder"])
def test_clip_skip_takes_as_many_values_as_the_text_encoder_has_layers(name, kind, tmp_path):
    path = tmp_path / name
    tiny.write_file(path, kind=kind) if path.suffix else tiny.write_folder(path, kind)
    checkpoint = inspect_checkpoint(str(path))
    num_layers = tiny.models(kind).text_encoders[0].config.num_hidden_layers
    check_clip_skip(ModelOptions(clip_skip=num_layers), checkpoint)
    with pytest.raises(UserError, match=f"--clip_skip must be at most {num_layers}, .* got {num_layers + 1}"):
        check_clip_skip(ModelOptions(clip_skip=num_layers + 1), checkpoint)


def test_the_last_layer_of_sd2_is_not_counted(tmp_path):
    names = [f"cond_stage_model.model.transformer.resblocks.{layer}.ln_1.bias" for layer in range(24)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    assert num_text_layers(CheckpointInfo(tmp_path / "a.safetensors", "sd2", is_folder=False)) == 23


@pytest.mark.parametrize("v_parameterization", [True, False])
def test_flags_that_fit_the_file_give_no_warning(checkpoint, v_parameterization):
    assert not warnings(checkpoint, v2=checkpoint.kind == "sd2", v_parameterization=v_parameterization)


def test_v2_that_does_not_fit_is_said_once_with_what_the_model_is(checkpoint):
    (warning,) = warnings(checkpoint, v2=checkpoint.kind != "sd2")
    given = "--v2 is given" if checkpoint.kind != "sd2" else "--v2 is not given"
    assert warning.startswith(given) and checkpoint.description in warning


@pytest.mark.parametrize("v_parameterization", [True, False])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_scheduler_of_a_folder_is_compared_with_the_flag(prediction_type, v_parameterization, tmp_path):
    folder = inspect_checkpoint(str(tiny.write_folder(tmp_path / "model", prediction_type=prediction_type)))
    found = warnings(folder, v_parameterization=v_parameterization)
    if v_parameterization == (prediction_type == "v_prediction"):
        assert not found
    else:
        (warning,) = found
        assert "--v_parameterization" in warning and "training follows the flag" in warning


@pytest.mark.parametrize(("text", "answer"), [("{}", False), ("[]", None), ("{", None)])
def test_scheduler_that_tells_nothing_is_passed_over(text, answer, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    assert folder_predicts_v(CheckpointInfo(tmp_path, "sd2", is_folder=True)) is answer


def test_clip_skip_is_doubted_for_sd2_and_without_effect_on_sdxl(checkpoint):
    found = warnings(checkpoint, v2=checkpoint.kind == "sd2", clip_skip=2)
    words = {"sd1": [], "sd2": ["is seldom right with"], "sdxl": ["has no effect"]}[checkpoint.kind]
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True))


def test_more_rates_than_text_encoders_are_told_of(checkpoint):
    fits = {"v2": checkpoint.kind == "sd2"}
    count = 2 if checkpoint.kind == "sdxl" else 1
    assert not warnings(checkpoint, text_encoder_lr=[1e-4] * count, **fits)
    (warning,) = warnings(checkpoint, text_encoder_lr=[1e-4] * 3, **fits)
    assert "has 3 values" in warning and ("the first 2 count" in warning) == (count == 2)


def test_a_folder_is_always_mapped_and_that_is_said(tmp_path):
    (warning,) = warnings(CheckpointInfo(tmp_path, "sdxl", is_folder=True), disable_mmap_load_safetensors=True)
    assert "no effect on a diffusers folder" in warning
