"""`--cache_info`: metadata_cache.json has kohya's form, and what changed since it was written is never missed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library.dataset import picture_files
from library.dataset.config import SubsetOptions
from library.dataset.scan import ScannedDataset, as_decoded, scan, verify_pictures, write_info_caches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "图"):
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"cat {name}", encoding="utf-8")
    return tmp_path


def scanned(folder: Path) -> ScannedDataset:
    return scan([SubsetOptions(image_dir=folder, caption_extension=".txt", cache_info=True)])


def cached(folder: Path) -> dict:
    return json.loads((folder / "metadata_cache.json").read_text(encoding="utf-8"))


def test_the_file_has_paths_captions_and_sizes(folder):
    assert write_info_caches(scanned(folder)) == []
    assert cached(folder) == {
        str(folder / "a.png"): {"caption": "cat a", "resolution": [48, 32]},
        str(folder / "图.png"): {"caption": "cat 图", "resolution": [48, 32]},
    }


def test_sizes_in_the_file_spare_opening_the_pictures(folder, monkeypatch):
    write_info_caches(scanned(folder))
    before = scanned(folder).records
    monkeypatch.setattr(picture_files.Image, "open", None)
    assert scanned(folder).records == before


def test_new_pictures_vanished_ones_and_changed_captions_are_noticed(folder):
    write_info_caches(scanned(folder))
    (folder / "a.txt").write_text("dog", encoding="utf-8")
    (folder / "图.png").unlink()
    Image.new("RGB", (64, 16)).save(folder / "new.png")
    result = scanned(folder)
    assert [(r.path.name, r.caption, r.size_wh) for r in result.records] == [
        ("a.png", "dog", (48, 32)),
        ("new.png", "", (64, 16)),
    ]
    write_info_caches(result)
    assert list(cached(folder)) == [str(folder / "a.png"), str(folder / "new.png")]


def test_a_picture_of_another_size_is_noticed_when_it_is_decoded(folder):
    write_info_caches(scanned(folder))
    Image.new("RGB", (64, 16)).save(folder / "a.png")
    before = scanned(folder)
    after = as_decoded(before, verify_pictures(before.records))
    assert [r.size_wh for r in before.records] == [(48, 32), (48, 32)]
    assert [r.size_wh for r in after.records] == [(64, 16), (48, 32)]


def test_a_file_that_is_right_is_left_alone(folder):
    write_info_caches(scanned(folder))
    before = (folder / "metadata_cache.json").stat()
    write_info_caches(scanned(folder))
    assert (folder / "metadata_cache.json").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("text", ["{", "[]", '{"a.png": {}}', '{"a.png": {"resolution": [0, "x"]}}'])
def test_a_damaged_file_is_noted_and_made_anew(folder, text):
    (folder / "metadata_cache.json").write_text(text, encoding="utf-8")
    result = scanned(folder)
    assert any("metadata_cache.json is damaged and made anew" in note for note in result.notes)
    write_info_caches(result)
    assert len(cached(folder)) == 2


def test_paths_as_windows_writes_them_are_known(folder):
    info = {"C:\\pictures\\a.png": {"caption": "x", "resolution": [480, 320]}}
    (folder / "metadata_cache.json").write_text(json.dumps(info), encoding="utf-8")
    assert scanned(folder).records[0].size_wh == (480, 320)


def test_a_folder_that_cannot_be_written_is_a_note(folder):
    (folder / "metadata_cache.json").mkdir()
    (note,) = write_info_caches(scanned(folder))
    assert "metadata_cache.json cannot be written" in note
