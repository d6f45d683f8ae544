"""Subsets of the fine-tuning style: pictures named by a JSON file, with captions, tags and sizes."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.dataset.config import SubsetOptions
from library.dataset.metadata_file import combined_caption
from library.dataset.scan import as_decoded, scan, scan_dataset, tag_frequency, verify_pictures
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from tests import tiny
from train_network import train


def picture(path: Path, size_wh=(48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh, "red").save(path)
    return path


def metadata(path: Path, entries: dict | list) -> Path:
    """A .json file of a dict, or a .jsonl file of a list."""
    text = json.dumps(entries) if isinstance(entries, dict) else "\n".join(json.dumps(entry) for entry in entries)
    path.write_text(text, encoding="utf-8")
    return path


def scanned(folder: Path | None, file: Path, latents_suffice: bool = False, **subset_options):
    subset = SubsetOptions(image_dir=folder, metadata_file=file, **subset_options)
    return scan([subset], latents_suffice=latents_suffice)


def captions(result) -> dict[str, str]:
    return {record.path.name: record.caption for record in result.records}


def problem(folder: Path | None, file: Path) -> str:
    with pytest.raises(UserError) as error:
        scanned(folder, file)
    return str(error.value)


CAPTIONS = {  # caption, tags, separator, wildcards -> what is trained
    "caption alone": ("a cat", None, ",", False, "a cat"),
    "tags alone": (None, "cat, red", ",", False, "cat, red"),
    "empty caption": ("", "cat", ",", False, "cat"),
    "both": ("a cat", "cat, red", ", ", False, "a cat, cat, red"),
    "own separator": ("a cat", "cat; red", ";", False, "a cat;cat; red"),
    "several lines": ("one\ntwo", "x", ",", False, "one,x"),
    "lines of wildcards": ("one\n\ntwo", "x\ny", ",", True, "one,x,y\ntwo,x,y"),
    "tags in lines": (None, "x\ny", ",", True, "x,y"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_caption_and_tags_become_one_text(case):
    caption, tags, separator, wildcards, expected = CAPTIONS[case]
    subset = SubsetOptions(image_dir=None, caption_separator=separator, enable_wildcard=wildcards)
    assert combined_caption({"caption": caption, "tags": tags}, subset) == expected


def test_keys_are_names_paths_or_stems(tmp_path):
    folder = tmp_path / "图 片"
    for name in ("a.png", "b.c.png", "sub/d.png"):
        picture(folder / name)
    away = picture(tmp_path / "elsewhere" / "e.png")
    keys = ["a.png", "b.c", "sub/d.png", str(away)]
    result = scanned(folder, metadata(tmp_path / "m.json", {key: {"caption": key} for key in keys}))
    assert [record.path for record in result.records] == [folder / n for n in ("a.png", "b.c.png", "sub/d.png")] + [
        away
    ]
    assert [record.caption for record in result.records] == keys and result.notes == []


def test_what_does_not_match_is_told_with_counts(tmp_path):
    for name in ("a.png", "twice.png", "twice.jpg", "silent.png", "unnamed.png"):
        picture(tmp_path / name)
    entries = {key: {"caption": "x"} for key in ("a.png", "a", "twice", "gone.png", "also gone")} | {"silent.png": {}}
    result = scanned(tmp_path, metadata(tmp_path / "m.json", entries))
    assert captions(result) == {"a.png": "x", "silent.png": ""}
    assert [record.caption_found for record in result.records] == [True, False]
    file = tmp_path / "m.json"
    assert result.notes == [
        f"{file}: 1 of 6 entries name a picture that another one names, and are left out (a)",
        f"{file}: 1 of 6 entries fit several pictures and are left out; add the extension (twice)",
        f"{file}: 2 of 6 entries name no picture and are left out (gone.png, also gone)",
        f"{file}: 1 of 6 entries have neither caption nor tags; their caption is empty (silent.png)",
        f"3 pictures in {tmp_path} left out: not in {file}",
    ]


def test_json_lines_say_the_same_as_json(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    entries = {"a.png": {"caption": "x", "image_size": [480, 320]}, "b.png": {"tags": "y", "train_resolution": [8, 8]}}
    lines = [{"image_path": key} | entry for key, entry in entries.items()]
    results = [
        scanned(tmp_path, metadata(tmp_path / "m.json", entries)),
        scanned(tmp_path, metadata(tmp_path / "m.JSONL", lines)),
    ]
    assert results[0].records == results[1].records
    assert [record.size_wh for record in results[0].records] == [(480, 320), (48, 32)]


def test_a_size_in_the_file_spares_opening_the_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"opened only to be decoded")
    file = metadata(tmp_path / "m.json", {"a.png": {"caption": "x", "image_size": [64, 80]}})
    assert scanned(tmp_path, file).records[0].size_wh == (64, 80)


def test_a_wrong_size_in_the_file_is_put_right_when_pictures_are_decoded(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    file = metadata(tmp_path / "m.json", {"a.png": {"image_size": [32, 48]}, "b.png": {"image_size": [48, 32]}})
    before = scanned(tmp_path, file)
    after = as_decoded(before, verify_pictures(before.records))
    assert [record.size_wh for record in after.records] == [(48, 32), (48, 32)]
    (note,) = set(after.notes) - set(before.notes)
    assert note == f"wrong sizes noted for 1 picture are put right ({tmp_path / 'a.png'}: 48x32, not 32x48)"


MISTAKES = {
    "cut off": ("m.json", '{"a.png": {\n"caption": "x"\n', r"m\.json:3: not JSON: "),
    "cut line": ("m.jsonl", '{"image_path": "a.png"}\n\n{"image_path"\n', r"m\.jsonl:3: not JSON: "),
    "no path": ("m.jsonl", '{"caption": "x"}', r"m\.jsonl:1: the line has no image_path"),
    "a list": ("m.json", "[]", r"m\.json names no pictures; it should hold"),
    "no object": ("m.json", '{"a.png": "x"}', r"m\.json: a\.png must have an object with caption or tags, got 'x'"),
    "no text": ("m.json", '{"a.png": {"tags": ["x"]}}', r"m\.json: a\.png has a tags that is not text"),
    "no size": ("m.json", '{"a.png": {"image_size": [1]}}', r"a\.png has an image_size that is not \[width, height\]"),
    "nothing fits": ("m.json", '{"b.png": {}}', r"names no pictures of .*: 1 of 1 entries name no picture "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_told_with_its_place(mistake, tmp_path):
    name, text, expected = MISTAKES[mistake]
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        scanned(tmp_path, tmp_path / name)


def test_a_relative_key_needs_a_folder(tmp_path):
    file = metadata(tmp_path / "m.json", {"a.png": {}})
    assert "a.png is not an absolute path, so the subset needs an image_dir" in problem(None, file)
    assert scanned(None, metadata(file, {str(picture(tmp_path / "a.png")): {}})).records[0].path == tmp_path / "a.png"


def test_each_folder_is_listed_once_however_many_keys_it_has(tmp_path, monkeypatch):
    for index in range(20):
        picture(tmp_path / "sub" / f"{index}.png")
    entries = {f"sub/{index}.png": {"caption": "x", "image_size": [48, 32]} for index in range(20)}
    file, listed, looked_at = metadata(tmp_path / "m.json", entries), [], []
    scandir, stat = os.scandir, os.stat

    def counted(path):
        listed.append(path)
        return scandir(path)

    def noted(path, **more):
        looked_at.append(path)
        return stat(path, **more)

    monkeypatch.setattr(os, "scandir", counted)
    monkeypatch.setattr(os, "stat", noted)
    assert len(scanned(tmp_path, file).records) == 20
    assert listed == [str(tmp_path / "sub")] and set(looked_at) == {file}


def test_latents_stand_in_for_a_picture_that_is_gone_only_where_they_are_used(tmp_path):
    picture(tmp_path / "a.png")
    for name in ("b_0640x0480_sd.npz", "c_0064x0064_sd.npz", "c_0128x0064_sd.npz"):
        (tmp_path / name).touch()
    entries = {"a.png": {}, "b": {"tags": "x"}, "c.png": {"image_size": [128, 64]}, "d.png": {}}
    file = metadata(tmp_path / "m.json", entries)
    records = scanned(tmp_path, file, latents_suffice=True).records
    assert [(r.path.name, r.size_wh, r.is_gone) for r in records] == [
        ("a.png", (48, 32), False),
        ("b.png", (640, 480), True),
        ("c.png", (128, 64), True),
    ]
    assert [(file, found.size_wh) for file, found in verify_pictures(records).items()] == [
        (str(tmp_path / "a.png"), (48, 32))
    ]
    without = scanned(tmp_path, file)
    assert [record.path.name for record in without.records] == ["a.png"]
    assert any("2 of 4 entries" in note and "--cache_latents_to_disk" in note for note in without.notes)


def test_the_flags_make_one_subset_with_their_repeats(tmp_path):
    picture(tmp_path / "a.png")
    file = metadata(tmp_path / "m.json", {"a.png": {"caption": "Cat, red", "tags": "red"}})
    options = TrainNetworkOptions(
        train_data_dir=str(tmp_path), in_json=str(file), dataset_repeats=3, resolution="64", shuffle_caption=True
    )
    result = scan_dataset(options)
    (subset,) = result.subsets
    assert (subset.num_repeats, subset.shuffle_caption, subset.is_reg) == (3, True, False)
    assert tag_frequency(result) == {"m.json": {"cat": 1, "red": 2}}


def trained_metadata(arguments: list[str], output: Path) -> dict[str, str]:
    train(arguments)
    with safe_open(str(output / "lora.safetensors"), "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", ["npz", "packed"])
def test_a_run_with_in_json_trains_from_pictures_and_then_from_their_latents_alone(kind, tmp_path, tiny_file):
    folder = tiny.write_pictures(tmp_path, "pictures", 2) / "pictures"
    entries = {"picture 0": {"caption": "a cat"}, "picture 1.png": {"tags": "cat"}}
    file = metadata(tmp_path / "cats.json", entries)
    arguments = tiny.arguments(
        tiny_file, folder, tmp_path / "out", in_json=file, dataset_repeats=2, cache_latents=None,
        cache_latents_to_disk=True, max_train_epochs=None, max_train_steps=2, latent_cache=kind,
    )  # fmt: skip
    first = trained_metadata(arguments, tmp_path / "out")
    assert json.loads(first["ss_dataset_dirs"]) == {"cats.json": {"n_repeats": 2, "img_count": 2}}
    assert first["ss_num_train_images"] == "4" and "ss_datasets" not in first
    for path in folder.glob("*.png"):
        path.unlink()
    assert trained_metadata(arguments, tmp_path / "out")["ss_num_train_images"] == "4"
    with pytest.raises(UserError, match=r"no latents on disk fit this run in their place: .*picture 0\.png$"):
        train([*arguments, "--resolution", "64,64", "--max_bucket_reso", "64"])


def test_a_run_may_mix_datasets_of_folders_and_of_files(tmp_path, tiny_file):
    folder = tiny.write_pictures(tmp_path, "cats", 2) / "cats"
    other = tiny.write_pictures(tmp_path, "dogs", 1) / "dogs"
    metadata(tmp_path / "dogs.json", {"picture 0": {"caption": "a dog"}})
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
        [general]
        resolution = 64
        caption_extension = ".txt"
        [[datasets]]
        [[datasets.subsets]]
        image_dir = '{folder}'
        num_repeats = 1
        [[datasets]]
        [[datasets.subsets]]
        metadata_file = '{tmp_path / "dogs.json"}'
        image_dir = '{other}'
        """,
        encoding="utf-8",
    )
    arguments = tiny.arguments(
        tiny_file, folder, tmp_path / "out", train_data_dir=None, resolution=None, dataset_config=config,
        dataset_repeats=5, max_train_epochs=None, max_train_steps=2,
    )  # fmt: skip
    fields = trained_metadata(arguments, tmp_path / "out")
    cats, dogs = json.loads(fields["ss_datasets"])
    assert (cats["is_dreambooth"], dogs["is_dreambooth"]) == (True, False)
    assert (cats["num_train_images"], dogs["num_train_images"]) == (2, 5)
    (subset,) = dogs["subsets"]
    assert (subset["metadata_file"], subset["image_dir"]) == ("dogs.json", "dogs")
    assert not {"class_tokens", "is_reg"} & subset.keys()
    assert dogs["tag_frequency"] == {"dogs.json": {"a dog": 1}}
    assert set(json.loads(fields["ss_dataset_dirs"])) == {"cats", "dogs.json"}
