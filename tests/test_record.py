"""The record beside a network: what it says is so, and it repeats the run to the bit."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.dataset.scan import scan_dataset
from library.errors import Stopped, UserError
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.training.network_recipe import NetworkRecipe
from library.training.plan import StepPlan
from library.training.record import MAX_STRETCHES, RunRecord, StepTimes
from library.training.run_facts import dataset_facts
from library.training.running import check_not_running
from library.training.saving import LoopState
from tests import tiny
from tests.results import weights_equal
from train_network import train

PLAN = StepPlan(4, 4, 1, 1, num_epochs=2, max_train_steps=8)
CONFIG = """
pretrained_model_name_or_path = "模型 1.safetensors"
train_data_dir = "train"
resolution = "64,64"
output_dir = "out"
output_name = "猫"
network_dim = 4
learning_rate = 1e-3
network_args = ["conv_dim=2"]
max_train_steps = 3
max_data_loader_n_workers = 0
shuffle_caption = true
caption_tag_dropout_rate = 0.5
network_dropout = 0.2
validation_split = 0.25
"""


@pytest.fixture
def project(tiny_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that CONFIG names, as the working folder."""
    folder = pictures.parent
    shutil.copyfile(tiny_file, folder / "模型 1.safetensors")
    (folder / "lora.toml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def read_record(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_without_a_seed_is_repeated_to_the_bit_from_its_record_in_another_folder(project, monkeypatch, tmp_path):
    train(["--config_file", "lora.toml", "--network_alpha", "2"])
    first = read_record(project / "out" / "猫-run.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(["--config_file", str(project / "out" / "猫-run.json"), "--output_name", "again"])
    assert weights_equal(project / "out" / "猫.safetensors", Path("out") / "again.safetensors")
    second = read_record(Path("out") / "again-run.json")
    assert second["options"]["seed"] == first["options"]["seed"]
    assert second["dataset"] == first["dataset"] and second["base_model"] == first["base_model"]
    assert second["defaults"] == first["defaults"]
    assert second["sources"]["output_name"] == "command line"
    place, line = second["sources"]["network_dim"].rsplit(":", 1)
    assert '"network_dim": 4' in Path(place).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_a_record_says_what_was_done_and_where_each_option_came_from(project):
    train(["--config_file", "lora.toml", "--network_alpha", "2", "--seed", "7"])
    record = read_record(project / "out" / "猫-run.json")
    assert (record["outcome"], record["error"]) == ("finished", None)
    assert record["progress"]["steps"] == [3, 3] and record["progress"]["loss_average"] > 0
    assert record["seconds_a_step"]["counted"] >= 1
    assert record["base_model"] == hashlib.sha256((project / "模型 1.safetensors").read_bytes()).hexdigest()
    assert record["dataset"]["num_pictures"] == {"training": 3, "validation": 1}
    assert record["versions"]["torch"] == torch.__version__
    assert record["sources"]["network_dim"] == "lora.toml:7"
    assert record["sources"]["network_alpha"] == "command line"
    assert record["options"]["network_args"] == ["conv_dim=2"]
    assert record["defaults"]["train_batch_size"] == 1 and "train_batch_size" not in record["options"]
    options = read_options(TrainNetworkOptions, ["--config_file", str(project / "out" / "猫-run.json")])
    given = read_options(TrainNetworkOptions, ["--config_file", "lora.toml", "--network_alpha", "2", "--seed", "7"])
    flags = record["options"].keys() | record["defaults"].keys()
    assert len(flags) > 60 and all(getattr(options, name) == getattr(given, name) for name in flags)
    assert options.sources.keys() - {"config_file"} == record["options"].keys()


@pytest.mark.parametrize(
    ("error", "outcome", "said"),
    [(Stopped("asked"), "stopped", None), (KeyboardInterrupt(), "stopped", None), (UserError("no"), "failed", "no")],
)
def test_a_record_is_there_from_the_start_and_tells_how_a_run_ended(error, outcome, said, tmp_path):
    options = TrainNetworkOptions(output_dir=str(tmp_path), huggingface_token="hf_0123456789")
    state = LoopState(seed=5)
    record = RunRecord(options, PLAN, StepTimes(), {"dataset": {"num_pictures": {"training": 4}}})
    with pytest.raises(type(error)), record.kept(state):
        begun = read_record(tmp_path / "last-run.json")
        state.step = 2
        raise error
    assert (begun["outcome"], begun["progress"]["steps"], begun["options"]["seed"]) == ("running", [0, 8], 5)
    ended = read_record(tmp_path / "last-run.json")
    assert (ended["outcome"], ended["error"], ended["progress"]["steps"]) == (outcome, said, [2, 8])
    assert ended["secrets_left_out"] == ["huggingface_token"]


def test_the_record_of_a_killed_run_tells_its_last_save(project, monkeypatch):
    class Killed(BaseException):
        """Ends a run as a kill does: nothing is written after it."""

    def kill_at_the_third(self: NetworkRecipe, state: LoopState) -> None:
        if state.step == 3:
            raise Killed
        finish_step(self, state)
        self.files.meanwhile.finish()  # a save may else end after the next step

    finish_step = NetworkRecipe.step_finished
    monkeypatch.setattr(NetworkRecipe, "step_finished", kill_at_the_third)
    with pytest.raises(Killed):
        train(["--config_file", "lora.toml", "--save_every_n_steps", "2", "--save_state"])
    record = read_record(project / "out" / "猫-run.json")
    assert (record["outcome"], record["progress"]["steps"]) == ("running", [2, 3])
    assert record["seconds_a_step"]["counted"] == 1


def test_names_of_a_run_that_is_still_at_work_are_refused_until_it_has_ended(project, capsys):
    record = RunRecord(
        TrainNetworkOptions(output_dir="out", output_name="猫"), PLAN, StepTimes(), {"dataset": {"num_pictures": {}}}
    )
    arguments = ["--config_file", "lora.toml", "--seed", "1", "--resume", "auto"]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: other.pid)
            record.write("running", LoopState())
        with pytest.raises(
            UserError, match=rf"--output_dir: a run is at work .* in out: process {other.pid}, since 20"
        ):
            train(arguments)
        check_not_running(TrainNetworkOptions(output_dir="out", output_name="another"))
        text = record.path.read_text(encoding="utf-8")
        written = json.loads(text)
        written["process"]["began"] -= 3600  # a process that had the number before
        for process in (written["process"], {"machine": written["process"]["machine"], "pid": "x", "began": 0}, 5):
            record.path.write_text(json.dumps(written | {"process": process}), encoding="utf-8")
            check_not_running(record.options)
        record.path.write_text(text, encoding="utf-8")
        other.communicate(b"\n")
    train(arguments)
    assert "process" not in read_record(project / "out" / "猫-run.json")


def test_a_run_that_begins_anew_names_the_files_it_overwrites(project, capsys):
    (project / "out").mkdir()
    for name in (
        "猫.safetensors",
        "猫-step00000002.safetensors",
        "猫-step00000008.safetensors",
        "猫-000001.safetensors",
    ):
        (project / "out" / name).touch()
    arguments = ["--config_file", "lora.toml", "--save_every_n_steps", "2", "--save_state", "--resume", "auto"]
    train(arguments)
    files = "猫-step00000002.safetensors, 猫.safetensors"
    said = f"WARNING out has files of an earlier run that are overwritten: {files}; give"
    assert f"{said} another --output_name to keep them" in capsys.readouterr().err
    train(arguments[:-2])
    assert f"{said} --resume auto to go on where it ended" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    options = TrainNetworkOptions(output_dir=str(tmp_path / "file"), seed=1)
    with RunRecord(options, PLAN, StepTimes(), {}).kept(LoopState()):
        pass
    assert "the record of the run cannot be written" in caplog.messages[0]


def test_a_secret_of_a_recorded_run_has_to_be_given_again(tmp_path, caplog):
    path = tmp_path / "a-run.json"
    path.write_text(json.dumps({"athanor_run": 1, "secrets_left_out": ["wandb_api_key"], "options": {}}))
    with pytest.raises(UserError, match="--output_dir is required"):
        read_options(TrainNetworkOptions, ["--config_file", str(path)])
    assert caplog.messages == [f"{path}: the run was given --wandb_api_key, which no record keeps; give it again"]


def test_a_default_that_has_changed_since_is_taken_from_the_record(project):
    tables = {"defaults": {"train_batch_size": 3, "lr_scheduler": "constant"}, "options": {"network_dim": 2}}
    Path("old-run.json").write_text(json.dumps({"athanor_run": 1, "working_dir": 1, **tables}, indent=1))
    required = tiny.arguments(project / "模型 1.safetensors", project / "train", project / "out", network_dim=None)
    options = read_options(TrainNetworkOptions, ["--config_file", "old-run.json", *required])
    assert (options.train_batch_size, options.network_dim) == (3, 2)
    assert "lr_scheduler" not in options.sources


def test_the_fingerprint_of_a_dataset_is_that_of_its_copy_and_changes_with_a_caption(pictures, tmp_path):
    def fingerprint(folder: Path, repeats: int = 2) -> object:
        scanned = scan_dataset(TrainNetworkOptions(train_data_dir=str(folder), caption_extension=".txt"))
        return dataset_facts({"training": scanned}, [repeats] * 4)["fingerprint"]

    shutil.copytree(pictures, tmp_path / "copy", copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / "copy") == fingerprint(pictures) != fingerprint(pictures, repeats=3)
    next((tmp_path / "copy").rglob("*.txt")).write_text("a dog", encoding="utf-8")
    assert fingerprint(tmp_path / "copy") != fingerprint(pictures)


def test_step_times_are_summed_up_in_few_numbers():
    times = StepTimes()
    times.seconds.extend(number / 1000 for number in range(1000, 0, -1))
    times.cpu_seconds.extend(number / 2000 for number in range(1000, 0, -1))
    summary = times.summary()
    assert (summary["counted"], summary["mean"], summary["p50"], summary["p95"]) == (1000, 0.5005, 0.5, 0.95)
    assert summary["cpu_p50"] == 0.25
    assert len(summary["stretches"]) == MAX_STRETCHES and summary["stretches"][0] == 0.998


def test_a_step_with_something_else_in_it_is_not_counted():
    times = StepTimes()
    for _ in range(3):
        times.step_finished()
    times.interrupted()
    times.step_finished()
    times.step_finished()
    assert times.summary()["counted"] == 3
