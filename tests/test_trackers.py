"""Curves, pictures and options in TensorBoard and wandb: real runs of both, wandb offline."""

import json
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from library.training.network_recipe import NetworkRecipe
from library.training.saving import LoopState
from library.training.tracker_checks import check_trackers, read_tracker_config
from library.training.trackers import Tracker, loggable_options
from tests import tiny
from train_network import train

wandb = pytest.importorskip("wandb")
Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record

KEY = "0123456789abcdef" * 5  # no real one
PROMPTS = "a 猫 --w 64 --h 64 --s 1 --d 7\na dog --w 64 --h 64 --s 1\n"
TAGS = {"loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet"}
AXES = ("global_step", "epoch")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # settings are read once


def wandb_records(folder: Path) -> list[Record]:
    """What the one run under a folder has written: LevelDB's log format after a header of seven bytes."""
    wandb.teardown()  # its service writes a moment later than a run finishes
    (path,) = [*folder.rglob("offline-run*/*.wandb")] or folder.rglob("run-*/*.wandb")
    data, records, record = path.read_bytes(), [], b""
    position = 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no record begins at the very end of a block
            position += 32768 - position % 32768
        size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(record))
            record = b""
    return records


def history(records: list[Record]) -> list[dict]:
    """The values of each call of `log`, without wandb's own."""
    rows = [record.history.item for record in records if record.HasField("history")]
    named = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in named]


def test_wandb_offline_gets_curves_pictures_and_options_but_no_secrets(
    offline, tiny_file, pictures, prompts, tmp_path, monkeypatch
):
    config = tmp_path / "tracker.toml"
    config.write_text('[wandb]\ntags = ["猫"]\n', encoding="utf-8")
    argv = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", log_with="wandb", logging_dir=tmp_path / "日志 dir", log_config=True,
        log_tracker_name="cats", wandb_run_name="the run", log_tracker_config=config, wandb_api_key=KEY,
        sample_prompts=prompts, sample_every_n_epochs=1,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_network.py", *argv, f"--huggingface_token={KEY}"])
    train(argv)
    assert not list((tmp_path / "日志 dir").rglob("events.*"))
    records = wandb_records(tmp_path / "日志 dir")

    (run,) = [record.run for record in records if record.HasField("run")][:1]
    assert (run.project, run.display_name, list(run.tags)) == ("cats", "the run", ["猫"])
    rows = history(records)
    assert {name.partition(".")[0] for row in rows for name in row} == TAGS | {"sample_0", "sample_1", *AXES}
    assert [row["global_step"] for row in rows if "loss/current" in row] == list(range(1, 9))
    assert [row["epoch"] for row in rows if "loss/epoch_average" in row] == [1]
    (samples,) = [row for row in rows if "sample_0.path" in row]
    captions = [samples[f"sample_{enum}.caption"] for enum in (0, 1)]
    assert (samples["global_step"], captions) == (8, ["a 猫", "a dog"])
    (media,) = (tmp_path / "日志 dir").rglob("media/images")
    drawn = [path.read_bytes() for path in sorted((tmp_path / "out" / "sample").iterdir())]
    assert sorted(path.read_bytes() for path in media.iterdir()) == sorted(drawn)
    updates = {item.key: item.value_json for record in records for item in record.config.update}
    assert updates["network_dim"] == "4" and "wandb_api_key" not in updates
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_wandb_out_of_reach_is_said_once_and_the_run_is_kept(
    offline, tiny_file, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = tmp_path / "tracker.toml"
    config.write_text(f"[wandb]\ndir = '{tmp_path}'\nsettings = {{init_timeout = 1}}\n", encoding="utf-8")
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", log_with="wandb", log_tracker_config=config, wandb_api_key=KEY
        )
    )
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert capsys.readouterr().err.count("wandb is out of reach") == 1
    assert [row["global_step"] for row in history(wandb_records(tmp_path)) if "loss/current" in row][-1] == 8


class WandbServer:
    """As much of wandb's server as lets a run begin; from `die` on it hangs up on every request."""

    def __init__(self):
        self.is_dead, self.requests_when_dead = False, 0
        handler = type("Handler", (WandbHandler,), {"wandb_server": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        self.is_dead = True


class WandbHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wandb_server: WandbServer

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.wandb_server.is_dead:
            self.wandb_server.requests_when_dead += 1
            self.close_connection = True
            return
        answer = json.dumps({"data": self.data(json.loads(body))} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST

    def data(self, request: dict) -> dict:
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "project": project, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.wandb_server.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}


def test_a_wandb_server_that_vanishes_costs_neither_the_run_nor_what_was_logged(
    offline, tiny_file, pictures, tmp_path, monkeypatch
):
    """wandb is told to wait for it for 2 seconds at the end, where `FINISH_SECONDS` would be the limit."""
    server, finish_step = WandbServer(), NetworkRecipe.step_finished

    def die_at_4(self: NetworkRecipe, state: LoopState) -> None:
        finish_step(self, state)
        if state.step == 4:
            server.die()

    monkeypatch.setattr(NetworkRecipe, "step_finished", die_at_4)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    config = tmp_path / "tracker.toml"
    config.write_text(f"[wandb]\ndir = '{tmp_path}'\nsettings = {{finish_timeout = 2}}\n", encoding="utf-8")
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", log_with="wandb", log_tracker_config=config, wandb_api_key=KEY
        )
    )
    assert (tmp_path / "out" / "lora.safetensors").is_file() and server.requests_when_dead
    steps = [row["global_step"] for row in history(wandb_records(tmp_path)) if "loss/current" in row]
    assert steps == list(range(1, 9))
    server.server.shutdown()
    server.server.server_close()


def test_tensorboard_gets_pictures_and_options(tiny_file, pictures, prompts, tmp_path):
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", logging_dir=tmp_path / "logs", log_config=True,
            sample_prompts=prompts, sample_every_n_steps=4, sample_at_first=True,
        )
    )  # fmt: skip
    (run,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(run / "network_train"), size_guidance={"images": 0}).Reload()
    shown = events.Images("sample_0")
    assert [event.step for event in shown] == [0, 4, 8]
    assert (shown[0].width, shown[0].height) == (64, 64)
    assert events.Tags()["images"] == ["sample_0", "sample_1"]
    (hparams,) = [path for path in (run / "network_train").iterdir() if path.is_dir()]
    assert "_hparams_/session_start_info" in EventAccumulator(str(hparams)).Reload().summary_metadata


def test_settings_of_a_tracker_that_it_does_not_have_are_a_mistake(tiny_file, pictures, tmp_path):
    config = tmp_path / "tracker.toml"
    config.write_text("[tensorboard]\nflush_sec = 1\n", encoding="utf-8")
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", logging_dir=tmp_path / "logs", log_tracker_config=config
    )
    with pytest.raises(UserError, match="--log_tracker_config: tensorboard does not take this: .*flush_sec"):
        train(arguments)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[wandb]\nname = x", "not valid TOML"),
        ("name = 'x'", r"must hold tables named \[tensorboard\] or \[wandb\], found name"),
        ("[mlflow]", "found mlflow"),
    ],
)
def test_tracker_config_that_is_none(text, problem, tmp_path):
    path = tmp_path / "tracker.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"--log_tracker_config: .*{problem}"):
        read_tracker_config(TrainNetworkOptions(log_tracker_config=str(path)))


def test_wandb_without_a_key_is_a_mistake_before_training(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--log_with wandb: .*--wandb_api_key .*WANDB_MODE=offline"):
        check_trackers(TrainNetworkOptions(log_with="wandb"))


def test_missing_package_is_named_and_a_folder_of_runs_is_none(monkeypatch, tmp_path):
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError) as caught:
        check_trackers(TrainNetworkOptions(log_with="all", logging_dir="logs"))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "--log_with tensorboard needs the package tensorboard",
        "--log_with wandb needs the package wandb",
    ]


def test_tracker_that_fails_is_named_once_and_left_alone(caplog):
    class Broken(Tracker):
        name = "wandb"
        calls = 0

        def write_values(self, values, step):
            self.calls += 1
            raise OSError("no space left\nand more")

    tracker = Broken()
    for step in range(3):
        tracker.log({"loss/current": 1.0}, step)
    assert (tracker.calls, [record.getMessage() for record in caplog.records]) == (
        1,
        ["wandb takes no more curves, and training goes on: no space left"],
    )


def test_logged_options_hold_no_secrets_and_no_paths():
    options = TrainNetworkOptions(huggingface_token="hf_x", wandb_api_key="w", output_dir="home", network_dim=8)
    shown = loggable_options(options)
    assert shown["network_dim"] == 8
    assert not {"huggingface_token", "wandb_api_key", "output_dir"} & set(shown)
