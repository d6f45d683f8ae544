"""The hashes of the base model: those that programs know, found once, in the background, and never in the way."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from library import user_cache
from library.options.groups import ModelOptions
from library.training import model_hashes as module
from library.training.model_hashes import TABLE, ModelHashes, file_hashes, model_hashes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder that is not there yet."""
    monkeypatch.setenv("ATHANOR_CACHE_DIR", str(tmp_path / "缓存"))
    return tmp_path / "缓存"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "模型 1.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)  # 1.28 MB
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed."""
    read: list[Path] = []
    monkeypatch.setattr(module, "file_hashes", lambda path: read.append(path) or file_hashes(path))
    return read


def test_hashes_of_the_model_are_those_the_webui_knows(tmp_path):
    path = tmp_path / "model.safetensors"
    data = bytes(range(256)) * 5000  # 1.28 MB
    path.write_bytes(data)
    window, whole = file_hashes(path)
    assert whole == hashlib.sha256(data).hexdigest()
    assert window == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert model_hashes(str(path), "sd_model") == {
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": window,
        "ss_new_sd_model_hash": whole,
    }


def test_folder_of_a_model_has_a_name_and_no_hashes(tiny_folder):
    found = model_hashes(f"{tiny_folder}{os.sep}", "sd_model")
    assert found["ss_sd_model_name"] == tiny_folder.name
    assert found["ss_new_sd_model_hash"] == "IsADirectory"


def test_a_file_is_hashed_again_only_where_it_has_changed(cache, model, reads):
    first = model_hashes(str(model), "sd_model")
    assert model_hashes(str(model), "vae")["ss_new_vae_hash"] == first["ss_new_sd_model_hash"] == sha256_of(model)
    assert len(reads) == 1
    data, status = model.read_bytes(), model.stat()
    for number, change in enumerate(("time", "size", "inode"), start=2):
        if change == "inode":  # another file of this name, size and time
            shutil.move(model, model.with_name("old"))
        model.write_bytes(data + b"x" if change == "size" else bytes([number]) + data[1:])
        os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
        assert model_hashes(str(model), "sd_model")["ss_new_sd_model_hash"] == sha256_of(model), change
        assert len(reads) == number
        data, status = model.read_bytes(), model.stat()


@pytest.mark.parametrize("content", ["{", "[1]", '{"%s": 3}', '{"%s": {"file": null}}', "\udcff"])
def test_what_is_remembered_may_be_broken(cache, model, content):
    cache.mkdir()
    (cache / TABLE).write_bytes(content.replace("%s", str(model)).encode("utf-8", "surrogateescape"))
    assert model_hashes(str(model), "sd_model")["ss_new_sd_model_hash"] == sha256_of(model)
    assert json.loads((cache / TABLE).read_text(encoding="utf-8"))[str(model)]["sha256"] == sha256_of(model)


def test_a_home_that_cannot_be_written_to_is_no_hindrance(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ATHANOR_CACHE_DIR", str(tmp_path / "a file" / "cache"))
    assert model_hashes(str(model), "sd_model")["ss_new_sd_model_hash"] == sha256_of(model)
    assert not caplog.records


def test_a_model_that_is_gone_by_then_costs_its_hash_and_no_more(cache, model, tmp_path, caplog):
    hashes = ModelHashes(ModelOptions(pretrained_model_name_or_path=str(model), vae=str(tmp_path / "gone.pt")))
    hashes.start()
    found = hashes.fields()
    assert found["ss_new_sd_model_hash"] == sha256_of(model)
    assert found["ss_vae_name"] == "gone.pt" and "ss_new_vae_hash" not in found
    assert "without the hash of" in caplog.text
    assert hashes.fields_by_now() == found


def test_the_folder_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("ATHANOR_CACHE_DIR")
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(variable, str(tmp_path))
    assert user_cache.cache_folder() == tmp_path / "athanor"
    monkeypatch.delenv(variable)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    assert user_cache.cache_folder() == tmp_path / ".cache" / "athanor"


def test_a_table_keeps_the_newest_entries(cache, monkeypatch):
    monkeypatch.setattr(user_cache, "MAX_ENTRIES", 2)
    for name in ("a", "b", "a", "c"):
        user_cache.remember(TABLE, name, 1)
    assert list(user_cache.remembered(TABLE)) == ["a", "c"]
