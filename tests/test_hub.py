"""Uploads and downloads by the real client of the Hugging Face hub, against a stand-in on this computer."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from library.errors import UserError
from library.options.derived import HubPlace, hub_place
from library.options.groups import TrainNetworkOptions
from library.training.hub import Uploads, check_uploads, fetch_state
from tests import tiny
from tests.hub_server import TOKEN, Hub
from tests.results import weights_equal
from train_network import train

REPO = "models/owner/cats"
ACCESS = {"huggingface_repo_id": "owner/cats", "huggingface_token": TOKEN}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The client as HF_ENDPOINT, HF_HUB_OFFLINE=0, HF_HUB_DISABLE_XET=1 and HF_HOME would have it."""
    with Hub() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage protocol of its own
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files_under(folder: Path, prefix: str = "") -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {f"{prefix}{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths}


def test_what_a_run_saves_is_uploaded_and_resumes_a_run_elsewhere(hub, tiny_folder, pictures, tmp_path, capsys):
    common = dict(max_train_epochs=2, lr_scheduler="cosine", shuffle_caption=True)
    train(
        tiny.arguments(
            tiny_folder, pictures, tmp_path / "whole", save_every_n_epochs=1, save_state=True, async_upload=True,
            save_state_to_huggingface=True, huggingface_path_in_repo="loras/猫", **ACCESS, **common,
        )
    )  # fmt: skip
    written = files_under(tmp_path / "whole", "loras/猫/")
    for name in ("lora-run.json", "lora-report.html"):  # they tell of the user's computer and pictures
        del written[f"loras/猫/{name}"]
    assert hub.repos[REPO] == written
    train(
        tiny.arguments(
            tiny_folder, pictures, tmp_path / "resumed", resume="owner/cats/loras/猫/lora-000001-state:main:model",
            resume_from_huggingface=True, huggingface_token=TOKEN, **common,
        )
    )  # fmt: skip
    messages = capsys.readouterr().err
    assert "going on from step 8 of epoch 2" in messages
    assert "was not uploaded" not in messages and TOKEN not in messages
    assert weights_equal(*(tmp_path / name / "lora.safetensors" for name in ("resumed", "whole")))


def saved(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    path.write_bytes(b"weights")
    return path


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("where", ["commit", "storage"])
@pytest.mark.parametrize("async_upload", [False, True])
def test_failed_upload_is_one_warning_and_the_next_one_is_tried(async_upload, where, hub, tmp_path, caplog):
    uploads = Uploads(TrainNetworkOptions(**ACCESS, async_upload=async_upload))
    path = saved(tmp_path)
    hub.refuses = (where, 403)
    uploads.add(path)
    uploads.wait_for(path)
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{path} was not uploaded to owner/cats, but is safe on disk: ")
    hub.refuses = None
    uploads.add(path)
    uploads.finish()
    assert hub.repos[REPO] == {"lora.safetensors": b"weights"}
    assert warnings_of(caplog) == [warning]


def test_uploads_in_the_background_are_whole_before_their_files_go(hub, tmp_path):
    uploads = Uploads(TrainNetworkOptions(**ACCESS, async_upload=True))
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
        uploads.add(path)
    for path in paths[:2]:
        uploads.wait_for(path)
        path.unlink()
    uploads.finish()
    assert hub.repos[REPO] == {path.name: path.name.encode() for path in paths}


def test_repository_is_made_at_the_start_as_public_only_where_asked(hub):
    check_uploads(TrainNetworkOptions(**ACCESS, huggingface_repo_visibility="public", huggingface_repo_type="dataset"))
    assert hub.private == {"datasets/owner/cats": False}
    check_uploads(TrainNetworkOptions(**ACCESS))
    assert hub.private == {"datasets/owner/cats": False, REPO: True}


@pytest.mark.parametrize(
    ("options", "refuses", "problem"),
    [
        (ACCESS | {"huggingface_token": None}, None, "uploading needs an access token"),
        (ACCESS | {"huggingface_token": "hf_other"}, None, "the token may not write to owner/cats"),
        (ACCESS, ("auth-check", 403), "the token may not write to owner/cats"),
        (ACCESS, ("create", 403), "the token may not write to owner/cats"),
    ],
)
def test_token_that_cannot_upload_is_a_mistake_at_the_start(options, refuses, problem, hub):
    hub.refuses = refuses
    with pytest.raises(UserError, match=f"--huggingface_repo_id: {problem}"):
        check_uploads(TrainNetworkOptions(**options))


def test_hub_out_of_reach_is_a_warning_for_uploads_and_a_mistake_for_resuming(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    options = TrainNetworkOptions(**ACCESS, resume="owner/cats/state", resume_from_huggingface=True)
    check_uploads(options)
    path = saved(tmp_path)
    Uploads(options).add(path)
    assert [text.partition(": ")[0] for text in warnings_of(caplog)] == [
        "--huggingface_repo_id",
        f"{path} was not uploaded to owner/cats, but is safe on disk",
    ]
    with pytest.raises(UserError, match="--resume owner/cats/state: it cannot be downloaded"):
        fetch_state(options)


def test_offline_is_said_before_training(monkeypatch, caplog):
    options = TrainNetworkOptions(**ACCESS, resume="owner/cats/state", resume_from_huggingface=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_uploads(options)
    assert "while HF_HUB_OFFLINE is set; unset it to upload" in warnings_of(caplog)[0]
    with pytest.raises(UserError, match="while HF_HUB_OFFLINE is set; unset it"):
        fetch_state(options)


def test_state_that_is_not_there_is_a_mistake(hub):
    hub.repos[REPO] = {"other/train_state.json": b"{}"}
    options = TrainNetworkOptions(huggingface_token=TOKEN, resume="owner/cats/state", resume_from_huggingface=True)
    with pytest.raises(UserError, match="--resume owner/cats/state: owner/cats has no folder state"):
        fetch_state(options)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("o/r/state", HubPlace("o/r", "state", None, None)),
        ("o/r/a/b:v1", HubPlace("o/r", "a/b", "v1", None)),
        ("o/r/a/b/:v1:dataset", HubPlace("o/r", "a/b", "v1", "dataset")),
    ],
)
def test_place_of_a_state(text, place):
    assert hub_place(text) == place


@pytest.mark.parametrize("text", ["state", "o/r", "o/r/", "o/r/a:b:c:d", "/o/r"])
def test_place_that_is_none_is_a_mistake(text):
    with pytest.raises(UserError, match=r"--resume must be OWNER/REPO/FOLDER\[:REVISION\[:TYPE\]\] on Hugging Face"):
        hub_place(text)
