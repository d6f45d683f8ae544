"""Which files a run writes, under which names, which it removes, and that a file is whole or not there."""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from library.dataset.dataset import TrainingDataset
from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.files import write_text_whole, written_whole
from library.network_files import read_weights, write_weights
from library.options.cli import read_options
from library.options.derived import optimizer_name
from library.options.groups import SavingOptions, TrainNetworkOptions
from library.recipes.network import first_state
from library.training.losses import LossRecorder
from library.training.metadata import TrainingMetadata
from library.training.optimizers import find_spec
from library.training.plan import StepPlan, step_plan
from library.training.resuming import read_state, resumed_state
from library.training.saving import (
    LoopState,
    OutputNames,
    epoch_to_remove,
    remove_checkpoint,
    remove_state,
    step_to_remove,
)
from tests import tiny

GOLDEN_METADATA = json.loads(
    (Path(__file__).parent / "data" / "sample_lora_metadata_sd15.json").read_text(encoding="utf-8")
)
STATE = {
    **{"current_epoch": 2, "current_step": 12, "batch_in_epoch": 4, "epoch_finished": False, "seed": 7},
    **{"stops": [5], "losses": [0.25, 0.1]},
}

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epoch", "step", "final"),
    [
        ("cat 猫", "cat 猫-000003.safetensors", "cat 猫-step00000012.safetensors", "cat 猫.safetensors"),
        (None, "epoch-000003.safetensors", "at-step00000012.safetensors", "last.safetensors"),
        ("v1.5", "v1.5-000003.safetensors", "v1.5-step00000012.safetensors", "v1.5.safetensors"),
    ],
)
def test_files_have_kohyas_names(name, epoch, step, final, tmp_path):
    names = OutputNames(SavingOptions(output_dir=str(tmp_path), output_name=name))
    assert [names.epoch(3), names.step(12), names.final()] == [tmp_path / epoch, tmp_path / step, tmp_path / final]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pt"])
def test_format_decides_the_ending(suffix, tmp_path):
    names = OutputNames(SavingOptions(output_dir=str(tmp_path), output_name="a", save_model_as=suffix))
    assert names.final().name == f"a.{suffix}"


def test_states_have_kohyas_names(tmp_path):
    names = OutputNames(SavingOptions(output_dir=str(tmp_path), output_name="v1.5"))
    checkpoints = names.epoch(3), names.step(12), names.final()
    assert [names.state_of(path).name for path in checkpoints] == [
        "v1.5-000003-state",
        "v1.5-step00000012-state",
        "v1.5-state",
    ]


# --- what is removed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "every", "keep", "gone"),
    [
        (9, 3, 3, 3),
        (6, 3, 3, None),
        (12, 3, 3, 6),
        (10, 2, 4, 4),
        (100, 10, 35, 60),
        (9, 3, None, None),
        (9, 3, 0, None),
    ],
)
def test_step_that_is_removed(step, every, keep, gone):
    assert step_to_remove(step, every, keep) == gone


@pytest.mark.parametrize(
    ("epoch", "every", "keep", "gone"),
    [(3, 1, 2, 1), (2, 1, 2, None), (6, 2, 2, 2), (4, 2, 2, None), (5, 1, None, None), (5, 1, 0, None)],
)
def test_epoch_that_is_removed(epoch, every, keep, gone):
    assert epoch_to_remove(epoch, every, keep) == gone


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("keep", [1, 3, 4, 10, 25])
def test_files_of_steps_from_now_back_to_the_kept_ones_stay(every, keep):
    files = set()
    for step in range(every, 60, every):
        files.add(step)
        files.discard(step_to_remove(step, every, keep))
        assert files == {other for other in range(every, step + 1, every) if other >= step - keep}


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_files_of_the_last_epochs_stay(every, keep):
    files = []
    for epoch in range(every, 40, every):
        files = [other for other in [*files, epoch] if other != epoch_to_remove(epoch, every, keep)]
        assert files == list(range(every, epoch + 1, every))[-keep:]


def test_removing_what_is_there_and_what_is_not(tmp_path):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "a-state").mkdir()
    (tmp_path / "a-state" / "optimizer.bin").touch()
    for _ in range(2):
        remove_checkpoint(tmp_path / "a.safetensors")
        remove_state(tmp_path / "a-state")
    assert not list(tmp_path.iterdir())


# --- where training starts, and the counters of a state --------------------------------------------------------------


PLAN = StepPlan(12, batches_per_epoch=6, num_processes=1, accumulation=2, num_epochs=4, max_train_steps=12)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, LoopState(epoch=1, step=0, batch=0, seed=7)),
        ({"initial_epoch": 3}, LoopState(epoch=3, step=6, batch=0, seed=7)),
        ({"initial_step": 4}, LoopState(epoch=2, step=4, batch=2, seed=7)),
        ({"initial_step": 4, "resume": "auto"}, LoopState(epoch=2, step=4, batch=2, seed=7)),  # and no state
        ({"initial_step": 4, "initial_epoch": 9}, LoopState(epoch=2, step=4, batch=2, seed=7)),
    ],
)
def test_counting_begins_where_the_options_say(options, wanted):
    assert first_state(TrainNetworkOptions(seed=7, **options), PLAN, None) == wanted


@pytest.mark.parametrize(
    ("batch", "finished", "wanted"), [(4, False, (2, 5, 4)), (6, True, (3, 6, 0)), (6, False, (2, 6, 6))]
)
def test_a_state_of_a_finished_epoch_goes_on_with_the_next(batch, finished, wanted, tmp_path):
    facts = {"current_step": 3 + batch // 2, "batch_in_epoch": batch, "epoch_finished": finished}
    (tmp_path / "train_state.json").write_text(json.dumps(STATE | facts))
    state = first_state(TrainNetworkOptions(), PLAN, tmp_path)
    assert (state.epoch, state.step, state.batch, state.seed) == (*wanted, 7)


def test_a_state_before_the_last_saves_goes_on_and_one_after_them_does_not(tmp_path):
    for finished in (False, True):
        facts = {"current_epoch": 4, "batch_in_epoch": 6, "epoch_finished": finished}
        (tmp_path / "train_state.json").write_text(json.dumps(STATE | facts))
        if not finished:
            assert resumed_state(tmp_path, PLAN, 1).step == PLAN.max_train_steps
    with pytest.raises(UserError, match="the state is at step 12 and training ends at 12"):
        resumed_state(tmp_path, PLAN, 1)


def test_state_is_read_back(tmp_path):
    (tmp_path / "train_state.json").write_text(json.dumps(STATE))
    state = read_state(tmp_path, PLAN, 1)
    assert state == LoopState(epoch=2, step=12, batch=4, seed=7, stops=[5], losses=LossRecorder([0.25, 0.1]))
    assert state.facts() == STATE | {"skipped": [0, 0], "curves": {}}


@pytest.mark.parametrize(("step", "wanted"), [(4, (2, 4, 2)), (6, (3, 6, 0))])
def test_the_place_of_a_state_of_kohyas_scripts_is_that_of_its_step(step, wanted, tmp_path):
    (tmp_path / "train_state.json").write_text(json.dumps({"current_epoch": 9, "current_step": step}))
    state = resumed_state(tmp_path, PLAN, 3)
    assert (state.epoch, state.step, state.batch, state.seed) == (*wanted, 3)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", '{"current_epoch": 2}', "[" * 100_000]
    + [
        json.dumps(STATE | fact) for fact in ({"losses": 3}, {"losses": [0.5, "x"]}, {"stops": [None]}, {"stops": [-1]})
    ],
)
def test_state_that_is_not_whole_is_a_mistake(text, tmp_path):
    if text is not None:
        (tmp_path / "train_state.json").write_text(text)
    with pytest.raises(UserError, match="--resume: .* is no whole state"):
        read_state(tmp_path, PLAN, 1)


# --- whole or not there ----------------------------------------------------------------------------------------------


def test_file_appears_at_the_end_of_the_block_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, ".txt")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_old_file_stays_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("no space left")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_stays_when_the_block_of_a_new_file_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_file_has_the_permissions_that_open_gives(tmp_path):
    write_text_whole(tmp_path / "a.txt", "a")
    with open(tmp_path / "b.txt", "w") as file:
        file.write("b")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_text_is_utf8_with_lf_on_every_system(tmp_path):
    write_text_whole(tmp_path / "a.txt", "猫\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == "猫\nb\n".encode()


def test_name_of_any_length_can_be_written(tmp_path):
    path = tmp_path / ("猫" * 80 + ".safetensors")
    write_text_whole(path, "a")
    assert path.read_text() == "a"


# --- network files ---------------------------------------------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "lora_unet_b.lora_up.weight": torch.randn(8, 4).t(),  # not contiguous
        "lora_unet_b.alpha": torch.tensor(1),
        "lora_te_a.lora_down.weight": torch.randn(300, 1000),  # the file is larger than 1 MiB
    }


def parts_of(path: Path) -> tuple[dict, bytes]:
    """Metadata and tensor data of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])["__metadata__"], data[8 + size :]


def test_model_hash_is_that_of_the_tensor_data(tmp_path):
    write_weights(tmp_path / "a.safetensors", weights(), None, {"ss_epoch": "1", "modelspec.title": "a"})
    metadata, data = parts_of(tmp_path / "a.safetensors")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["ss_epoch"] == "1" and metadata["modelspec.title"] == "a"


def test_legacy_hash_is_that_of_a_window_of_the_file_with_ss_metadata_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights(path, weights(), None, {"ss_epoch": "1", "modelspec.title": "a"})
    contiguous = {name: value.contiguous() for name, value in weights().items()}
    window = save(contiguous, {"ss_epoch": "1"})[0x100000:0x110000]
    assert parts_of(path)[0]["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_legacy_hash_of_a_small_file_is_that_of_nothing(tmp_path):
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(2)}, None, None)
    assert parts_of(tmp_path / "a.safetensors")[0]["sshs_legacy_hash"] == "e3b0c442"


def test_hashes_do_not_depend_on_the_metadata_that_is_not_of_the_training(tmp_path):
    hashes = []
    for title in ("a", "another"):
        write_weights(tmp_path / "a.safetensors", weights(), None, {"ss_epoch": "1", "modelspec.title": title})
        metadata, _ = parts_of(tmp_path / "a.safetensors")
        hashes.append((metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_all_weights_are_cast_alpha_too(suffix, dtype, tmp_path):
    write_weights(tmp_path / f"a{suffix}", weights(), dtype, None)
    found = read_weights(tmp_path / f"a{suffix}")
    assert {name: (value.dtype, value.shape) for name, value in found.items()} == {
        name: (dtype, value.shape) for name, value in weights().items()
    }
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in weights().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_without_a_dtype_weights_stay_as_they_are(suffix, tmp_path):
    write_weights(tmp_path / f"a{suffix}", weights(), None, {"ss_epoch": "1"})
    found = read_weights(tmp_path / f"a{suffix}")
    assert found.keys() == weights().keys()
    assert found["lora_unet_b.alpha"].dtype == torch.int64
    assert all(torch.equal(found[name], value) for name, value in weights().items())


def test_pickled_network_holds_weights_alone(tmp_path):
    write_weights(tmp_path / "a.pt", weights(), None, {"ss_epoch": "1"})
    assert set(torch.load(tmp_path / "a.pt", weights_only=True)) == set(weights())


def test_trained_parameters_are_saved_without_their_gradients(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    write_weights(tmp_path / "a.safetensors", {"a": parameter * 2}, None, None)
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [2, 2]


def test_every_value_of_the_metadata_is_text(tmp_path):
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(2)}, None, {"ss_a": None, "ss_b": True, "ss_c": (1, 2)})
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        found = file.metadata()
    assert (found["ss_a"], found["ss_b"], found["ss_c"]) == ("None", "True", "(1, 2)")


# --- metadata of a run -----------------------------------------------------------------------------------------------


def metadata_of(model: Path, pictures: Path, output: Path, **options) -> TrainingMetadata:
    argv = tiny.arguments(model, pictures, output, **options)
    read = read_options(TrainNetworkOptions, argv)
    dataset = TrainingDataset(scan_dataset(read), read, seed=1, max_train_steps=8)
    family = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1"}
    family |= {"modelspec.implementation": "diffusers", "modelspec.prediction_type": "epsilon"}
    plan = step_plan(read, len(dataset), batches_per_epoch=8, processes=1)
    return TrainingMetadata(read, family, dataset, "torch.optim.adamw.AdamW", find_spec(optimizer_name(read)), plan)


def test_fields_are_kohyas(tiny_file, pictures, tmp_path):
    metadata = metadata_of(tiny_file, pictures, tmp_path, network_args=["conv_dim=2"])
    written_by_files = {name for name in GOLDEN_METADATA if name.startswith("sshs_")}
    assert set(metadata.at(8, 1)) == set(GOLDEN_METADATA) - written_by_files
    assert all(isinstance(value, str) for value in metadata.at(8, 1).values())


def test_fields_say_what_was_trained(tiny_file, pictures, tmp_path):
    found = metadata_of(tiny_file, pictures, tmp_path, resolution="96,64", network_args=["conv_dim=2"]).at(6, 1)
    assert (found["ss_steps"], found["ss_epoch"], found["ss_num_train_images"]) == ("6", "1", "8")
    assert found["ss_network_args"] == '{"conv_dim": "2", "dropout": null}'  # in kohya's order
    assert json.loads(found["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 4}}
    assert (found["ss_resolution"], found["modelspec.resolution"]) == ("(96, 64)", "96x64")
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["ss_sd_model_name"] == tiny_file.name


def test_schedule_of_relative_steps_is_written_as_adafactors_own(tiny_file, pictures, tmp_path):
    found = metadata_of(tiny_file, pictures, tmp_path, optimizer_type="Adafactor", learning_rate=0.5).at(8, 1)
    assert found["ss_lr_scheduler"] == "adafactor:0.5"
    plain = metadata_of(tiny_file, pictures, tmp_path, optimizer_type="AdamW", lr_scheduler="cosine").at(8, 1)
    assert plain["ss_lr_scheduler"] == "cosine"


def test_no_metadata_leaves_what_a_loader_needs(tiny_file, pictures, tmp_path):
    found = metadata_of(tiny_file, pictures, tmp_path, no_metadata=True).at(8, 1)
    assert {name for name in found if not name.startswith("modelspec.")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
    }
