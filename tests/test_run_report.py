"""What a run leaves beside its network: a page that tells of it, and the card that programs show."""

import base64
import hashlib
import io
import json
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.dataset.scan import scan_dataset
from library.generating.cards import trigger_words
from library.generating.charts import Line, chart, nice_ticks, smoothed
from library.generating.report_pictures import tiles_of
from library.generating.runs import find_run
from library.options.groups import TrainNetworkOptions
from library.training.losses import MAX_POINTS, Curve, Curves
from tests import tiny
from train_network import train

PROMPTS = "a cat --w 64 --h 64 --s 1 --d 7\n狗 <b> --w 64 --h 64 --s 1 --d 8"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_file) -> Path:
    folder = tmp_path_factory.mktemp("跑 run")
    more = {"sample_prompts": PROMPTS, "max_train_epochs": 3, "sample_every_n_epochs": 1, "cover_image": "auto"}
    more |= {"validation_split": 0.3, "save_every_n_epochs": 1}
    train(tiny.arguments(tiny_file, tiny.write_pictures(folder / "train"), folder / "out", **more))
    return folder / "out/lora"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_report_has_all_in_one_page(run):
    page = run.with_name("lora-report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?https?:", page) and "<script" not in page
    for words in (
        "Loss and learning rate",
        "validation",
        "epoch 3",
        "狗 &lt;b&gt;",
        "a cat, number",
        "&lt;lora:lora:1&gt;",
    ):
        assert words in page
    num_pictures = len(list((run.parent.parent / "train/2_cat").glob("*.png")))
    assert page.count("<img ") == 2 * 3 + num_pictures - 1  # one is held out
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawing)


def test_the_report_can_be_written_later_without_the_pictures(run, monkeypatch, capsys):
    (run.parent.parent / "train").rename(run.parent.parent / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["run_report.py", str(run)])
    runpy.run_path("tools/run_report.py", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(run.with_name("lora-report.html"))
    page = run.with_name("lora-report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 2 * 3 and "The pictures cannot be shown: " in page
    (run.parent.parent / "elsewhere").rename(run.parent.parent / "train")


def test_a_picture_that_vanished_while_training_is_left_out_of_the_report(tmp_path):
    folder = tiny.write_pictures(tmp_path / "train")
    options = TrainNetworkOptions(train_data_dir=str(folder), resolution="64,64", enable_bucket=False)
    scanned = scan_dataset(options)
    before = tiles_of(scanned, seed=1, max_train_steps=8)
    scanned.records[1].path.unlink()
    after = tiles_of(scanned, seed=1, max_train_steps=8)
    assert len(after) == len(before) - 1 == 3
    assert [tile.name for tile in after] == [tile.name for tile in before if "picture 1" not in tile.name]


def test_the_cover_is_in_the_network_and_its_hashes_stay_right(run):
    path = run.with_name("lora.safetensors")
    metadata = metadata_of(path)
    (cover,) = json.loads(metadata["ssmd_cover_images"])
    assert Image.open(io.BytesIO(base64.b64decode(cover))).size == (64, 64)
    data = path.read_bytes()
    weights = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(weights).hexdigest()
    assert "ssmd_cover_images" not in metadata_of(run.with_name("lora-000001.safetensors"))


def test_the_card_has_the_first_of_the_last_previews_and_trigger_words(run):
    card = json.loads(run.with_name("lora.json").read_text(encoding="utf-8"))
    assert (card["sd version"], card["activation text"]) == ("SD1", "a cat")
    (last,) = run.parent.glob("sample/lora_e000003_00_*.png")
    assert Image.open(run.with_name("lora.preview.png")).tobytes() == Image.open(last).tobytes()


def test_what_the_user_wrote_into_a_card_stays(tiny_file, tmp_path):
    cover = tmp_path / "封面.png"
    Image.new("RGB", (900, 600), "red").save(cover)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/lora.json").write_text('{"notes": "我的", "activation text": "mine", "x": 1}', encoding="utf-8")
    more = {"cover_image": cover, "no_report": True, "metadata_trigger_phrase": "a cat"}
    train(tiny.arguments(tiny_file, tiny.write_pictures(tmp_path / "train"), tmp_path / "out", **more))
    card = json.loads((tmp_path / "out/lora.json").read_text(encoding="utf-8"))
    assert (card["notes"], card["activation text"], card["x"], card["sd version"]) == ("我的", "mine", 1, "SD1")
    (data,) = json.loads(metadata_of(tmp_path / "out/lora.safetensors")["ssmd_cover_images"])
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 341)
    assert not list((tmp_path / "out").glob("*report*"))


def test_trigger_words_are_tags_of_nearly_all_captions_or_names_of_folders():
    counts = {"5_sks dog": {"sks": 10, "dog": 9, "grass": 4}, "1_reg": {"dog": 50}}
    facts = {"ss_tag_frequency": json.dumps(counts), "ss_dataset_dirs": json.dumps({"5_sks dog": {"img_count": 10}})}
    assert trigger_words(facts) == "sks, dog"
    assert trigger_words(facts, "my dog") == "my dog"
    assert trigger_words({"ss_dataset_dirs": facts["ss_dataset_dirs"]}) == "sks dog"
    assert trigger_words({}) == ""


def test_a_long_curve_keeps_means_of_stretches():
    curves = Curves()
    for step in range(1, 5001):
        curves.add("loss", step, float(step))
    curves.add("loss", 5001, float("nan"))
    kept = json.loads(json.dumps(curves.kept()))["loss"]
    size = kept["steps_a_stretch"]
    assert MAX_POINTS <= len(kept["points"]) <= 2 * MAX_POINTS and size == 8
    assert kept["points"][0] == [8, 4.5] and kept["points"][-1][0] == 5000
    again = Curves.of(json.loads(json.dumps(curves.kept())))
    assert again["loss"].points[:100] == curves["loss"].points[:100]
    assert Curves.of("nonsense") == {} and Curve().kept()["points"] == []


def test_curves_of_a_resumed_run_are_those_of_the_whole(run, tiny_file, tmp_path):
    def points(*, folder: Path, **more: object) -> list:
        words = tiny.arguments(tiny_file, run.parent.parent / "train", folder, save_state=True, **more)
        train([*words, "--save_every_n_epochs", "1"])
        return json.loads((folder / "lora-run.json").read_text(encoding="utf-8"))["curves"]["loss"]["points"]

    whole = points(folder=tmp_path / "whole", max_train_epochs=2)
    points(folder=tmp_path / "parts", max_train_epochs=1)
    assert points(folder=tmp_path / "parts", max_train_epochs=2, resume="auto") == whole


def test_charts_survive_odd_values():
    for values in ([], [0.0], [3.0], [1e-9, 2e-9], [-1.0, 1.0], [5.0] * 9, [0.1, 1e6]):
        text = chart("x & y", [Line("a <", list(enumerate(values))), Line("b", list(enumerate(values)))])
        if values:
            ET.fromstring(re.search(r"<svg.*</svg>", text)[0])
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert smoothed([(1, 2.0), (2, 2.0)]) == [(1, 2.0), (2, 2.0)]


def test_previews_are_found_in_order_also_of_a_run_without_a_name(tmp_path):
    (tmp_path / "sample").mkdir()
    for name in ("e000010_00_20260101000000_1.png", "e000002_00_20260101000000_1.png", "e000002_00_20260102000000.png"):
        (tmp_path / "sample" / name).touch()
    (tmp_path / "last-run.json").write_text('{"athanor_run": 1, "options": {}}', encoding="utf-8")
    found = find_run(str(tmp_path / "last")).previews()
    assert [(one.when, one.path.name[11:19]) for one in found] == [("epoch 2", "20260102"), ("epoch 10", "20260101")]
