"""A process that is killed while it writes: what exists is whole, and the next start goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.dataset import picture_index
from library.dataset.cache import read_with_origin
from library.dataset.index_file import StoredIndex
from library.dataset.pack_files import NAME as PACK
from library.dataset.packed_latents import PackedLatents
from library.dataset.text_cache import read_text
from library.leftovers import remove_leftovers
from library.network_files import read_weights
from library.options.config_file import read_config
from library.training.resuming import read_facts
from tests import tiny
from tests.conftest import RUNS_SLOW_TESTS
from tests.results import metadata_of, weights_equal

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process, which Windows lacks")

NUM_KILLS = 25 if RUNS_SLOW_TESTS else 2  # of each kind of write, at random moments
OPERATIONS_APART = 1 if RUNS_SLOW_TESTS else 19  # between those that a state is killed before
NUM_KILLED_RUNS = 8 if RUNS_SLOW_TESTS else 1


class Writer:
    """tests/killed_writer.py, which starts in seconds and its forks in milliseconds."""

    def __init__(self, errors: Path):
        self.errors = errors
        with open(errors, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.killed_writer"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": "."},
            )  # fmt: skip

    def begin(self, *line: object) -> int:
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        """Wait for the fork, whose process id is taken until then; its exit code."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self, pid: int, seconds: float) -> bool:
        """Kill a fork after a while; whether it was still at work."""
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        code = self.end()
        assert code in (-signal.SIGKILL, 0), self.errors.read_text()[-3000:]
        return code != 0


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Iterator[Writer]:
    writer = Writer(tmp_path_factory.mktemp("writer") / "errors.txt")
    yield writer
    writer.process.stdin.close()
    writer.process.wait()


# --- whether what is there is whole, and of which round --------------------------------------------------------------


def seen(folder: Path, pattern: str) -> list[Path]:
    """Files under their final names."""
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]


def round_of(*arrays) -> int:
    """The round that all values are of."""
    (value,) = {float(value) for array in arrays for value in np.unique(np.asarray(array))}
    return int(value)


def check_network(folder: Path) -> None:
    for path in folder.glob("lora.*"):
        weights = read_weights(path)
        assert [value.shape for value in weights.values()] == [(300, 300)] * 2
        found = round_of(*weights.values())
        assert path.suffix == ".pt" or metadata_of(path)["ss_steps"] == str(found)


def check_model(folder: Path) -> None:
    for path in folder.glob("model.*"):
        round_of(*load_file(path).values())


def check_states(folder: Path) -> None:
    for state in folder.glob("*-state"):
        optimizer = torch.load(state / "optimizer.bin", weights_only=True)["state"]
        weights = load_file(state / "model.safetensors")["weight"]
        assert (
            round_of(weights, *(moments["exp_avg"] for moments in optimizer.values()))
            == read_facts(state)["current_step"]
        )
        assert "torch_manual_seed" in torch.load(state / "random_states_0.pkl", weights_only=False)


def check_latents(folder: Path) -> None:
    for path in seen(folder, "*.npz"):
        cached, _ = read_with_origin(path)
        assert cached.latents.shape == cached.latents_flipped.shape == (4, 128, 96)
        round_of(cached.latents, cached.latents_flipped)


def check_packs(folder: Path) -> None:
    """A pack is in the place of the files of many pictures, so once there was one of them, they all are there."""
    files = PackedLatents("sd")
    files.clear_up([str(folder)])
    there = [name for name in map("{}.npz".format, range(5)) if files.has(str(folder / name))]
    for name in there:
        cached, origin = files.read_with_origin(str(folder / name))
        assert cached.latents.shape == cached.latents_flipped.shape == (4, 128, 96)
        assert round_of(cached.latents, cached.latents_flipped) == origin.picture.num_bytes
    (folder / "seen").mkdir(exist_ok=True)
    assert {path.name for path in (folder / "seen").iterdir()} <= set(there)
    for name in there:
        (folder / "seen" / name).touch()


def check_text(folder: Path) -> None:
    for path in seen(folder, "*.npz"):
        round_of(*read_text(path).values())


def check_pictures(folder: Path) -> None:
    for path in seen(folder, "sample/*.png"):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (300, 300, 3) and pixels[-1].any()


def check_config(folder: Path) -> None:
    for path in seen(folder, "*.toml"):
        given = read_config(path)
        assert given["network_args"].value == [f"a={given['output_name'].value}"] * 2000


def check_info(folder: Path) -> None:
    for path in seen(folder, "*.json"):
        noted = json.loads(path.read_text())
        assert len(noted) == 2000 and len({entry["caption"] for entry in noted.values()}) == 1


def check_index(folder: Path) -> None:
    for path in folder.glob(picture_index.NAME):
        stored = StoredIndex(path.read_bytes())
        pictures, captions = stored.pictures, stored.captions
        assert len(pictures) == len(captions) == 2000
        found = round_of([picture.content for picture in pictures.values()])
        assert {caption.text for caption in captions.values()} == {f"{found}" * 20}


def check_logs(folder: Path) -> None:
    """A log grows as it is written, so that its last line may lack its end."""
    for path in seen(folder, "*.log"):
        *lines, _ = path.read_text().split("\n")
        rounds = [int(line.split()[3]) for line in lines if line.endswith("x" * 3000)]
        assert len(rounds) == len(lines)
        assert all(after == before + 1 for before, after in zip(rounds, rounds[1:], strict=False))


def check_curves(folder: Path) -> None:
    if (folder / "run").is_dir():
        events = EventAccumulator(str(folder / "run")).Reload()
        steps = [event.step for tag in events.Tags()["scalars"][:1] for event in events.Scalars(tag)]
        assert steps == sorted(steps)


CHECKS = {
    "network": check_network,
    "model": check_model,
    "state": check_states,
    "latents": check_latents,
    "packs": check_packs,
    "text": check_text,
    "pictures": check_pictures,
    "config": check_config,
    "info": check_info,
    "index": check_index,
    "logs": check_logs,
    "curves": check_curves,
}


def go_on(kind: str, folder: Path) -> None:
    """What holds after a kill, and after the next start has cleared up."""
    CHECKS[kind](folder)
    remove_leftovers([folder, folder / "sample"])
    assert all(path.name == picture_index.NAME or PACK.fullmatch(path.name) for path in folder.rglob(".*"))
    CHECKS[kind](folder)


@pytest.mark.parametrize("kind", CHECKS)
def test_files_are_whole_after_kills_at_random_moments(kind, writer, tmp_path):
    rng = random.Random(kind)
    num_kills, files = 0, set()
    for attempt in range(NUM_KILLS):
        (tmp_path / "began").unlink(missing_ok=True)
        pid = writer.begin(kind, str(tmp_path), 0, attempt * 1000)
        while not (tmp_path / "began").exists():
            time.sleep(0.001)
        num_kills += writer.kill(pid, rng.uniform(0, 0.3))
        go_on(kind, tmp_path)
        lost = {path.name for path in files if not path.exists()}
        assert not lost or kind in ("config", "state", "packs"), lost  # they remove files themselves
        files = set(tmp_path.rglob("*"))
        assert kind != "state" or not attempt or (tmp_path / "lora-state").is_dir()
    writer.begin(kind, str(tmp_path), 10**9, 10**6)
    assert writer.end() == 0, writer.errors.read_text()[-3000:]
    go_on(kind, tmp_path)
    assert num_kills == NUM_KILLS and len(files) > 1


def test_there_is_always_a_whole_state_whatever_operation_a_kill_comes_before(writer, tmp_path):
    writer.begin("state", str(tmp_path), 10**9, 0)
    assert writer.end() == 0
    num_kills = 0
    for operation in range(random.Random(0).randint(1, OPERATIONS_APART), 1000, OPERATIONS_APART):
        writer.begin("state", str(tmp_path), operation, 10 * operation)
        if writer.end() == 0:
            break
        num_kills += 1
        go_on("state", tmp_path)
        assert (tmp_path / "lora-state").is_dir()
        for state in tmp_path.glob("lora-0*-state"):
            shutil.rmtree(state)
    assert num_kills > 60 / OPERATIONS_APART


# --- whole runs ------------------------------------------------------------------------------------------------------


def newest_state(output: Path) -> Path | None:
    return max(output.glob("*-state"), key=lambda state: read_facts(state)["current_step"], default=None)


@pytest.fixture
def run(writer, tiny_file, pictures, tmp_path):
    """Begin a run that writes at every step."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 7\n", encoding="utf-8")

    def begin(output: Path, **more: object) -> int:
        arguments = tiny.arguments(
            tiny_file, pictures, output, cache_latents_to_disk=True, save_every_n_steps=1, save_state=True,
            save_last_n_steps=2, sample_prompts=prompts, sample_every_n_steps=2, logging_dir=output / "logs",
            console_log_file=output / "run.log", **more,
        )  # fmt: skip
        return writer.begin("train", arguments)

    return begin


def check_run(output: Path, pictures: Path) -> None:
    for path in seen(output, "*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()) and metadata_of(path)["ss_steps"]
    for state in output.glob("*-state"):
        assert read_facts(state)["current_step"] and load_file(state / "model.safetensors")
        assert torch.load(state / "optimizer.bin", weights_only=True)["state"]
    for path in seen(output, "sample/*.png"):
        assert np.asarray(Image.open(path)).shape == (64, 64, 3)
    for path in seen(pictures, "*/*.npz"):
        assert read_with_origin(path)[1] is not None


def test_a_killed_run_goes_on_to_the_same_weights(run, writer, pictures, tmp_path):
    began = time.monotonic()
    run(tmp_path / "whole")
    assert writer.end() == 0, writer.errors.read_text()[-3000:]
    duration = time.monotonic() - began
    rng, num_kills, num_resumed = random.Random(1), 0, 0
    for attempt in range(NUM_KILLED_RUNS):
        output = tmp_path / f"killed {attempt}"
        for path in pictures.rglob("*.npz"):
            path.unlink()
        pid = run(output)
        if attempt % 2:  # anywhere, from the caches on
            seconds = rng.uniform(0.2, 0.9) * duration
        else:  # where there is a state to go on from
            sign, seconds = output / f"lora-step{rng.randint(1, 6):08d}-state", rng.uniform(0, 0.2)
            while not sign.exists():
                time.sleep(0.005)
        if not writer.kill(pid, seconds):
            continue
        num_kills += 1
        check_run(output, pictures)
        state = newest_state(output)
        num_resumed += state is not None
        run(output, resume=state)
        assert writer.end() == 0, writer.errors.read_text()[-3000:]
        check_run(output, pictures)
        assert weights_equal(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")
        assert not [path for path in (*output.rglob(".*"), *pictures.rglob(".*")) if path.name != picture_index.NAME]
    assert num_kills > NUM_KILLED_RUNS / 2 and num_resumed
