"""Keys and tokens: no file, message or error of a run shows them."""

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from library import secrets
from library.errors import UserError
from library.options.cli import read_options
from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from tests import tiny
from tests.hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[1]
KEY = "5ec2e7" * 7  # for wandb, which wants 40 characters or more
INNER_KEY = "0therKey" * 6  # in --log_tracker_config
SECRETS = (KEY, TOKEN, INNER_KEY)

# A run that ends in a bug whose message quotes both secrets.
WITH_A_BUG = """
import sys
import train_network
def train_network_with_a_bug(options, checked):
    raise RuntimeError(f"{options.wandb_api_key} and {options.huggingface_token}")
import library.recipes.network
library.recipes.network.train_network = train_network_with_a_bug
train_network.run_script(train_network.train)
"""


@pytest.fixture(autouse=True)
def forgotten_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_secrets", set())


def run(words: list[object], folder: Path, **environment: str) -> str:
    """All that a process says."""
    given = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "HOME": str(folder)}
    given = {name: value for name, value in given.items() if name not in ("WANDB_API_KEY", "HF_TOKEN")}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=given | environment, capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    return f"{done.stdout}{done.stderr}exit code {done.returncode}"


def leaks(folder: Path) -> list[Path]:
    """The files under a folder that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]


@pytest.fixture
def project(tiny_folder: Path, pictures: Path) -> Path:
    """A folder to run in; the tracker's settings with their key are outside of it."""
    folder = pictures.parent / "run"
    shutil.move(pictures, folder / "train")
    settings = f'[wandb]\nsettings = {{api_key = "{INNER_KEY}", console = "off"}}\n'
    (folder.parent / "trackers.toml").write_text(settings, encoding="utf-8")
    return folder


def test_a_run_with_all_trackers_and_uploads_writes_and_says_no_secret(tiny_folder, project):
    pytest.importorskip("wandb")
    words = tiny.arguments(
        tiny_folder, "train", "out", log_with="all", logging_dir="logs", log_config=True, save_state=True,
        log_tracker_config="../trackers.toml", wandb_api_key=KEY, huggingface_token=TOKEN, max_train_steps=2,
        huggingface_repo_id="owner/cats", console_log_level="DEBUG", max_train_epochs=None,
    )  # fmt: skip
    with Hub() as hub:
        said = run(
            [ROOT / "train_network.py", *words], project, WANDB_MODE="offline", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1", HF_HOME=str(project / "hub"),
        )  # fmt: skip
    assert said.endswith("exit code 0") and "uploaded: " in said, said[-2000:]
    assert list(project.rglob("*.wandb")) and list(project.rglob("events.*")) and list(project.rglob("*-run.json"))
    assert not any(secret in said for secret in SECRETS)
    assert leaks(project) == []
    assert not any(secret.encode() in data for secret in SECRETS for data in hub.repos["models/owner/cats"].values())


def test_the_traceback_of_a_bug_has_no_secrets(tiny_folder, project):
    words = tiny.arguments(tiny_folder, "train", "out", wandb_api_key=KEY, huggingface_token=TOKEN)
    said = run(["-c", WITH_A_BUG, *words], project)
    assert said.endswith("exit code 1") and "error: RuntimeError: (hidden) and (hidden)" in said
    (log,) = project.glob("athanor-error-*.log")
    assert "RuntimeError: (hidden) and (hidden)" in log.read_text(encoding="utf-8")
    assert leaks(project) == [] and not any(secret in said for secret in SECRETS)


@pytest.mark.parametrize(
    "line",
    [f"huggingface_token = {TOKEN}", f'huggingface_token = ["{TOKEN}"]', f"wandb_api_key = {KEY}x", f"hf_token={KEY}y"],
)
def test_a_mistake_about_a_secret_does_not_show_it(line, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "lora.toml").write_text(f"seed = 1\n{line}\n", encoding="utf-8")
    said = run([ROOT / "train_network.py", "--config_file", "../lora.toml"], folder)
    assert said.endswith("exit code 2") and "lora.toml:2: " in said
    assert not any(secret in said for secret in SECRETS)


def test_output_config_leaves_secrets_out_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--output_config", "--config_file", "new", "--wandb_api_key", KEY, "--huggingface_token", TOKEN]
    with pytest.raises(SystemExit):
        read_options(TrainNetworkOptions, words)
    said = capsys.readouterr().out
    assert "--wandb_api_key is secret" in said and "--huggingface_token is secret" in said
    assert leaks(tmp_path) == [] and not any(secret in said for secret in SECRETS)


def test_options_that_are_printed_have_no_secrets():
    assert {flag.name for flag in flags_of(TrainNetworkOptions).values() if flag.is_secret} == {
        "wandb_api_key",
        "huggingface_token",
    }
    assert KEY not in repr(TrainNetworkOptions(wandb_api_key=KEY, huggingface_token=KEY))
    suspects = [item.name for item in fields(TrainNetworkOptions) if secrets.SECRET_NAME.search(item.name)]
    assert all(flags_of(TrainNetworkOptions)[name].is_secret for name in suspects), "a new key is a secret too"


def test_short_values_and_other_texts_stay_as_they_are():
    secrets.hide("k")
    secrets.hide(None)
    secrets.hide_in({"wandb": {"api_key": KEY, "project": "cats and dogs"}})
    assert secrets.redacted(f"key {KEY} of cats and dogs") == "key (hidden) of cats and dogs"


def test_a_problem_with_a_secret_is_still_raised():
    with pytest.raises(UserError, match="--huggingface_token needs a value"):
        read_options(TrainNetworkOptions, ["--huggingface_token"])
