"""Tests run offline, on one thread, with real model classes at toy size."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = tempfile.TemporaryDirectory(prefix="athanor-tests-")  # gone with the process
os.environ["ATHANOR_CACHE_DIR"] = CACHE.name
for name in ("TMPDIR", "TEMP", "TMP"):  # of programs that tests start, whose bugs leave tracebacks there
    os.environ[name] = CACHE.name
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
RUNS_SLOW_TESTS = os.environ.get("ATHANOR_SLOW_TESTS") == "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The cores that are ours, at most four: each process takes some GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not RUNS_SLOW_TESTS:
        skip = pytest.mark.skip(reason="slow; test.sh --all runs it")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """One torch thread (two beside another job are many times slower), and no accelerator left from the last run."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD 1.x model at toy size as a diffusers folder."""
    from tests import tiny

    return tiny.write_folder(tmp_path_factory.mktemp("tiny") / "diffusers")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a single file in the LDM layout."""
    from tests import tiny

    return tiny.write_file(tmp_path_factory.mktemp("tiny") / "tiny 模型.safetensors")


@pytest.fixture(scope="session")
def tiny_sd2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD 2.x model at toy size as a single file."""
    from tests import tiny

    return tiny.write_file(tmp_path_factory.mktemp("tiny") / "tiny sd2.safetensors", kind="sd2")


@pytest.fixture(scope="session")
def tiny_sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL model at toy size as a single file."""
    from tests import tiny

    return tiny.write_file(tmp_path_factory.mktemp("tiny") / "tiny sdxl.safetensors", kind="sdxl")


@pytest.fixture(params=["sd1", "sdxl"])
def model_file(request: pytest.FixtureRequest) -> Path:
    """The single file of the toy model of each family."""
    return request.getfixturevalue({"sd1": "tiny_file", "sdxl": "tiny_sdxl_file"}[request.param])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A dataset folder with four pictures of two shapes in `2_cat`, captioned in .txt files."""
    from tests import tiny

    return tiny.write_pictures(tmp_path / "train")
