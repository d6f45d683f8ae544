"""Metadata of a file is changed without touching its tensors, and its hashes are those that training would write."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import CannotWrite, UserError
from library.network_files import content_hashes, write_weights
from tools.edit_metadata import main

CAPTIONED = {
    "ss_tag_frequency": '{"2_小猫": {"a cat": 4}}',
    "ss_dataset_dirs": '{"2_小猫": {"n_repeats": 2, "img_count": 4}}',
    "ss_datasets": json.dumps(
        [{"tag_frequency": {"a": {"b": 1}}, "subsets": [{"class_tokens": "me", "img_count": 3}]}]
    ),
    "ss_learning_rate": "0.001",
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "modelspec.title": "old",
}


@pytest.fixture
def file(tmp_path):
    """Larger than the window that the short hash is of."""
    torch.manual_seed(0)
    weights = {f"lora_te_{i}.lora_up.weight": torch.randn(300, 300 + i) for i in range(4)}
    weights |= {"lora_te_0.alpha": torch.tensor(4), "lora_te_1.alpha": torch.tensor(2.0, dtype=torch.float16)}
    path = tmp_path / "模型 é.safetensors"
    write_weights(path, weights, None, CAPTIONED)
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_fields_are_set_and_removed_and_hashes_follow(file, tmp_path):
    output = tmp_path / "out.safetensors"
    words = ["--title", "Ein Stil, 一个", "--trigger_words", "stl", "--set", "ss_training_comment=a=b", "my.key=1"]
    main(["--model", str(file), "--output", str(output), *words, "--remove", "ss_learning_rate"])
    found = metadata_of(output)
    assert same_tensors(file, output)
    assert found["modelspec.title"] == found["ssmd_display_name"] == "Ein Stil, 一个"
    assert found["modelspec.trigger_phrase"] == "stl"
    assert found["ss_training_comment"] == "a=b" and found["my.key"] == "1" and "ss_learning_rate" not in found
    hashes = content_hashes(load_file(output), found)
    assert hashes.items() <= found.items()
    assert hashes["sshs_legacy_hash"] != metadata_of(file)["sshs_legacy_hash"], "the window begins behind the header"


@pytest.mark.parametrize(
    ("level", "gone", "kept"),
    [
        ("captions", ["ss_tag_frequency"], ["ss_dataset_dirs", "ss_datasets", "ss_learning_rate"]),
        ("dataset", ["ss_tag_frequency", "ss_dataset_dirs", "ss_datasets"], ["ss_learning_rate"]),
        ("training", ["ss_dataset_dirs", "ss_learning_rate"], ["ss_base_model_version", "ss_v2", "modelspec.title"]),
        ("all", ["ss_v2", "modelspec.title", "sshs_model_hash"], []),
    ],
)
def test_stripping_leaves_no_trace_in_the_file(level, gone, kept, file):
    main(["--model", str(file), "--strip", level])
    found = metadata_of(file) or {}
    assert not found.keys() & set(gone) and set(kept) <= found.keys()
    data = file.read_bytes()
    assert b"a cat" not in data and b"class_tokens" not in data and b"tag_frequency" not in data


def test_a_cover_is_upright_small_and_says_nothing_of_its_file(file, tmp_path):
    picture = Image.new("RGB", (1600, 800), "red")
    exif = picture.getexif()
    exif[0x0112], exif[0x010E] = 6, "my secret prompt"  # lies on its side
    picture.save(tmp_path / "封面 1.jpg", exif=exif)
    main(["--model", str(file), "--cover_images", str(tmp_path / "封面 1.jpg")])
    (text,) = json.loads(metadata_of(file)["ssmd_cover_images"])
    cover = Image.open(io.BytesIO(base64.b64decode(text)))
    assert cover.size == (256, 512) and not cover.getexif()
    assert cover.getpixel((9, 9))[0] > 250
    main(["--model", str(file), "--remove", "ssmd_cover_images"])
    assert "ssmd_cover_images" not in metadata_of(file)


def test_mistakes_change_nothing(file, tmp_path, monkeypatch):
    before = file.read_bytes()
    (tmp_path / "no.png").write_text("no picture")
    for words, message in [
        (["--set", "=x"], "--set must be KEY=VALUE"),
        (["--remove", "ss_x"], "has no field ss_x"),
        (["--cover_images", str(tmp_path / "no.png")], "--cover_images: .*no.png.*not a picture"),
        (["--output", str(file)], "--overwrite replaces it"),
    ]:
        with pytest.raises(UserError, match=message):
            main(["--model", str(file), *words])
    monkeypatch.setattr("library.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CannotWrite):
        main(["--model", str(file), "--title", "x"])
    assert file.read_bytes() == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
