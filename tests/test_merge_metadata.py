"""Metadata files made of caption files are those that training reads, whichever way their pictures are named."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.merge_dd_tags_to_metadata import main as merge_tags
from library.dataset.config import SubsetOptions
from library.dataset.metadata_file import read_metadata_file
from library.errors import UserError
from tools.merge_captions_to_metadata import main as merge_captions


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two pictures with caption and tags, one of them in a folder below, and one with neither."""
    folder = tmp_path / "照片 pictures"
    for name in ("a", "in/b 猫", "c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        if name != "c":
            (folder / f"{name}.caption").write_text(f"caption of {name}\n", encoding="utf-8")
            (folder / f"{name}.txt").write_text(f"照片, {name}\n", encoding="gbk")
    return folder


def captions_in_training(path: Path, folder: Path | None) -> dict[str, str]:
    subset = SubsetOptions(image_dir=folder, metadata_file=path)
    read = read_metadata_file(subset)
    assert not read.problems
    return {Path(name).name: caption for name, caption in read.captions.items()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("full_path", [False, True])
def test_captions_and_tags_meet_in_one_file_that_training_reads(suffix, full_path, folder, tmp_path, capsys):
    out = tmp_path / f"meta{suffix}"
    words = [str(folder), str(out), "--recursive", *(["--full_path"] if full_path else [])]
    merge_captions(words)
    merge_tags(words)
    assert captions_in_training(out, None if full_path else folder) == {
        "a.png": "caption of a,照片, a",
        "b 猫.png": "caption of in/b 猫,照片, in/b 猫",
    }
    said = capsys.readouterr()
    assert said.out.endswith(f"tags of 2 pictures in {out}, of 2 entries\n")
    assert "1 picture without a .txt file" in said.err


def test_entries_under_older_names_are_taken_and_another_files_are_kept(folder, tmp_path):
    given, out = tmp_path / "given.json", tmp_path / "out.json"
    entries = {"a": {"caption": "old", "tags": "kept"}, "gone.png": {"caption": "also kept"}}
    given.write_text(json.dumps(entries), encoding="utf-8")
    merge_captions([str(folder), str(out), "--in_json", str(given), "--recursive"])
    assert json.loads(out.read_text(encoding="utf-8")) == {
        "a": {"caption": "caption of a", "tags": "kept"},
        "gone.png": {"caption": "also kept"},
        "in/b 猫.png": {"caption": "caption of in/b 猫"},
    }
    assert json.loads(given.read_text(encoding="utf-8")) == entries


def test_mistakes_are_sentences_and_write_nothing(folder, tmp_path):
    for words, sentence in {
        ("nowhere", "out.json"): "train_data_dir: there is no folder nowhere",
        (str(folder), "out.txt"): "out_json must end in .json or .jsonl, got out.txt",
        (str(folder), "out.json", "--in_json", "no.json"): "--in_json: there is no file no.json",
        (str(folder), str(tmp_path / "out.json"), "--caption_extension", ".x"): "no picture in .* has a .x file",
    }.items():
        with pytest.raises(UserError, match=sentence):
            merge_captions(list(words))
    assert not list(tmp_path.glob("out*"))
