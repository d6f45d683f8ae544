"""Tags from ONNX models of the shapes that real taggers have, and their spelling, order and files."""

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from library.captioning import sinks
from library.captioning.spelling import spaced
from library.captioning.tagger import model_input
from library.captioning.tags import TagRules, TagTable, TagWriter, parse_replacements
from library.dataset.metadata_file import read_entries
from library.errors import UserError
from tools.tag_images_by_wd14_tagger import main

SIDE = 448
NUM_TAGS = {"v2": 9083, "v3": 10861}
NAMED = {  # place -> name, category, and how it follows from the means of blue, green and red in 0..255
    0: ("general", 9, (0.0, 0.0, 0.0), 2.0),
    1: ("sensitive", 9, (0.0, 0.0, 0.0), -2.0),
    4: ("blue_theme", 0, (0.1, 0.0, -0.1), -10.0),
    5: ("red_theme", 0, (-0.1, 0.0, 0.1), -10.0),
    6: ("^_^", 0, (0.0, 0.0, 0.0), 3.0),
    7: ("bordered", 0, (0.1, 0.0, 0.0), -12.0),  # sure from a mean of blue above 120
    9000: ("hakurei_reimu_(touhou)", 4, (0.0, 0.0, 0.0), 0.0),  # a probability of 0.5
}


def write_tagger(folder: Path, num_tags: int, batch: int | str = "N", side: int = SIDE) -> Path:
    """A model from means of the channels to probabilities, with the inputs and outputs of a real one, and its table."""
    weights, bias = np.zeros((3, num_tags), np.float32), np.full(num_tags, -10, np.float32)
    rows = [(f"tag_{place}", 0) for place in range(num_tags)]
    for place, (name, category, weight, offset) in NAMED.items():
        weights[:, place], bias[place], rows[place] = weight, offset, (name, category)
    axes = numpy_helper.from_array(np.array([1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, num_tags])],
        [axes, numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    with open(folder / "selected_tags.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("tag_id", "name", "category", "count"))
        table.writerows((place, name, category, 1) for place, (name, category) in enumerate(rows))
    return folder


@pytest.fixture(params=NUM_TAGS)
def tagger(request, tmp_path) -> Path:
    return write_tagger(tmp_path / "模型 tagger", NUM_TAGS[request.param])


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A blue square, and a red picture twice as wide as high in a folder below."""
    folder = tmp_path / "照片 pictures"
    (folder / "inner").mkdir(parents=True)
    Image.new("RGB", (64, 64), (0, 0, 255)).save(folder / "blue.png")
    Image.new("RGB", (128, 64), (255, 0, 0)).save(folder / "inner" / "red 红.jpg", quality=100)
    return folder


def tag(pictures: Path, tagger: Path, *more: str) -> None:
    main([str(pictures), "--model_dir", str(tagger), "--recursive", *more])


def captions(pictures: Path) -> list[str]:
    return [(pictures / name).read_text(encoding="utf-8") for name in ("blue.txt", "inner/red 红.txt")]


def test_pictures_are_tagged_by_their_colours_on_a_white_square(tagger, pictures, capsys):
    tag(pictures, tagger, "--batch_size", "2", "--frequency_tags")
    # half of the red picture's square is white: its mean of blue is 127
    assert captions(pictures) == [
        "blue_theme, ^_^, bordered, hakurei_reimu_(touhou)\n",
        "red_theme, ^_^, bordered, hakurei_reimu_(touhou)\n",
    ]
    assert "^_^: 2\n" in capsys.readouterr().out


def test_options_choose_order_and_spell(tagger, pictures):
    words = (
        "--remove_underscore --character_tags_first --character_tag_expand --use_rating_tags "
        "--undesired_tags bordered,red_theme --always_first_tags ^_^"
    )
    tag(pictures, tagger, *words.split(), "--tag_replacement", r"blue theme,navy\, dark")
    assert captions(pictures) == [
        "^_^, general, hakurei reimu, touhou, navy, dark\n",
        "^_^, general, hakurei reimu, touhou\n",
    ]
    tag(pictures, tagger, "--overwrite", "--character_threshold", "0.6", "--use_rating_tags_as_last_tag")
    assert captions(pictures)[0] == "blue_theme, ^_^, bordered, general\n"


def test_what_is_tagged_stays_unless_asked_otherwise_and_new_tags_are_added_once(tagger, pictures):
    (pictures / "blue.txt").write_text("my own words, blue theme", encoding="utf-8")
    tag(pictures, tagger)
    assert captions(pictures)[0] == "my own words, blue theme"
    for _ in range(2):
        tag(pictures, tagger, "--append_tags")
        assert captions(pictures)[0] == "my own words, blue theme, ^_^, bordered, hakurei_reimu_(touhou)\n"
    tag(pictures, tagger, "--overwrite")
    assert captions(pictures)[0].startswith("blue_theme")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_metadata_file_takes_all_tags_and_is_gone_on_with(suffix, tmp_path, pictures):
    tagger, path = write_tagger(tmp_path / "tagger", NUM_TAGS["v3"]), tmp_path / f"tags{suffix}"
    red, blue = pictures / "inner" / "red 红.jpg", pictures / "blue.png"
    if suffix == ".json":
        path.write_text(json.dumps({red.as_posix(): {"tags": "mine", "caption": "kept"}}), encoding="utf-8")
    tag(pictures, tagger, "--output_path", str(path))
    entries = read_entries(path)
    assert entries[blue.as_posix()]["tags"].startswith("blue_theme, ^_^")
    assert entries[blue.as_posix()]["image_size"] == [64, 64]
    if suffix == ".json":
        assert entries[red.as_posix()] == {"tags": "mine", "caption": "kept"}


def test_a_metadata_file_is_written_before_the_end_too(tmp_path, monkeypatch):
    path, picture = tmp_path / "tags.json", tmp_path / "a.png"
    sink = sinks.MetadataFile(path, tmp_path)
    sink.write(picture, "red", (64, 64))
    assert not path.exists()
    monkeypatch.setattr(sinks, "SECONDS_BETWEEN_WRITES", 0)
    sink.write(tmp_path / "b.png", "blue", (64, 64))
    assert {entry["tags"] for entry in read_entries(path).values()} == {"red", "blue"}


def test_a_damaged_picture_is_named_and_the_others_are_tagged(tmp_path, pictures):
    tagger = write_tagger(tmp_path / "tagger", NUM_TAGS["v2"], batch=1)
    (pictures / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png \(not a picture that Pillow knows\)"):
        tag(pictures, tagger, "--batch_size", "4")
    assert len(captions(pictures)) == 2


def test_models_are_found_where_kohyas_script_puts_them_and_mistakes_are_sentences(tmp_path, pictures):
    inner = write_tagger(tmp_path / "models" / "SmilingWolf_wd-v1-4-convnext-tagger-v2", NUM_TAGS["v2"])
    tag(pictures, inner.parent)
    assert captions(pictures)[0].startswith("blue_theme")
    with pytest.raises(UserError, match=r"nowhere has no model.onnx and no selected_tags.csv; nothing is downloaded"):
        tag(pictures, tmp_path / "nowhere")
    lines = (inner / "selected_tags.csv").read_text(encoding="utf-8").splitlines()
    (inner / "selected_tags.csv").write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"model.onnx knows 9083 tags, .* names 9082"):
        tag(pictures, inner, "--overwrite")
    (inner / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot be opened as an ONNX model"):
        tag(pictures, inner, "--overwrite")


def test_the_model_sees_bgr_in_the_middle_of_white():
    image = np.zeros((10, 20, 3), dtype=np.uint8)
    image[..., 0] = 200
    given = model_input(image, 40)
    assert given.shape == (40, 40, 3) and given.dtype == np.float32
    assert given[20, 20].tolist() == [0, 0, 200] and given[2, 20].tolist() == [255, 255, 255]
    assert (given == given[::-1]).all()


def test_faces_keep_their_underscores():
    assert [spaced(tag) for tag in ("^_^", "(o)_(o)", "||_||", "o_o", "3_3")] == [
        "^_^",
        "(o)_(o)",
        "||_||",
        "o_o",
        "3_3",
    ]
    assert [spaced(tag) for tag in ("long_hair", "hair_over_one_eye", "x-ray_film")] == [
        "long hair", "hair over one eye", "x-ray film",
    ]  # fmt: skip


def test_thresholds_are_of_categories_and_what_has_none_gives_no_tag():
    table = TagTable(["a", "b", "c", "d"], ["general", "character", "rating", "category 7"])
    writer = TagWriter(table, TagRules({"general": 0.3, "character": 0.8}))
    assert writer.tags(np.array([0.3, 0.79, 1, 1], np.float32)) == ["a"]
    assert writer.tags(np.array([0.29, 0.8, 1, 1], np.float32)) == ["b"]


def test_replacements_that_are_no_pairs_are_refused():
    assert parse_replacements(r"a\,b,c;d_e,") == {"a,b": "c", "d e": ""}
    with pytest.raises(UserError, match="--tag_replacement takes pairs"):
        parse_replacements("a;b")
