"""--debug_dataset: sheets of what training sees, drawn before any model is loaded."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from library import pictures as drawing
from library.dataset import picture_index
from library.dataset.dataset import TrainingDataset
from library.dataset.images import to_model_input
from library.dataset.scan import scan_dataset
from library.dataset.sheet import (
    MAX_BATCHES,
    MAX_TILES,
    NUM_FIRST_BATCHES,
    PICTURE,
    Panel,
    chosen_batches,
    draw_sheets,
    num_buckets,
    panel_of,
    thumbnail,
)
from library.dataset.views import View
from library.options.groups import TrainNetworkOptions
from library.pictures import font_for, missing_characters, shortened, wrapped
from library.training.reports import aligned
from tests import tiny

ROOT = Path(__file__).parents[1]
CHINESE = "一个穿着红色连衣裙的女孩，站在樱花树下，微笑着看向镜头"

# fails where what training needs was imported
NO_MODELS = """
import sys
import train_network
try:
    train_network.run_script(train_network.train)
finally:
    found = {"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys()
    assert not found, f"{found} were imported to show a dataset"
"""


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pictures of three shapes with Chinese captions in `train/2_女孩`, one in `reg/1_animal`, masks of the former."""
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(100, 80), (64, 64), (40, 120), (90, 70)]):
        folder = tmp_path / ("reg/1_animal" if index == 3 else "train/2_女孩")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"图 {index}.png")
        (folder / f"图 {index}.txt").write_text(f"1girl, {CHINESE}, a, b, c, {index}", encoding="utf-8")
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2 :] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"图 {index}.png")
    return tmp_path


def options_of(folder: Path, **more) -> TrainNetworkOptions:
    values = dict(
        train_data_dir=str(folder / "train"), resolution="64", enable_bucket=True, min_bucket_reso=32,
        max_bucket_reso=128, bucket_reso_steps=8, caption_extension=".txt",
    )  # fmt: skip
    return TrainNetworkOptions(**(values | more))


def dataset_of(options: TrainNetworkOptions) -> TrainingDataset:
    return TrainingDataset(scan_dataset(options), options, seed=7, max_train_steps=10)


def panels_of(dataset: TrainingDataset) -> list[Panel]:
    return [panel_of(i, batch, dataset.views, dataset.repeats) for i, batch in enumerate(dataset.sampler())]


def test_a_tile_has_the_pixels_and_the_caption_that_training_sees(mixed):
    dataset = dataset_of(
        options_of(
            mixed, reg_data_dir=str(mixed / "reg"), train_batch_size=2, flip_aug=True, color_aug=True, random_crop=True,
            shuffle_caption=True, caption_prefix="photo,", caption_tag_dropout_rate=0.3, caption_dropout_rate=0.2,
        )
    )  # fmt: skip
    batches = list(dataset.sampler())
    for batch, panel in zip(batches, panels_of(dataset), strict=True):
        for draw, tile in zip(batch, panel.tiles, strict=True):
            example = dataset[draw]
            zoom = PICTURE // max(example.target_size_hw)
            assert tile.picture.size == tuple(side * zoom for side in panel.size_wh)
            seen = to_model_input(np.asarray(tile.picture)[::zoom, ::zoom])
            assert torch.equal(torch.from_numpy(seen), example.image)
            assert tile.caption == example.caption
            assert ("reg" in tile.marks) == (tile.name == "1_animal/图 3.png")
            assert tile.num_repeats == dataset.repeats[draw.index]
    assert len({tile.caption for panel in panels_of(dataset) for tile in panel.tiles}) > 4


def test_what_the_loss_does_not_count_is_dark(mixed):
    options = options_of(mixed, masked_loss=True, conditioning_data_dir=str(mixed / "masks"), resolution="64")
    plain, masked = dataset_of(options_of(mixed)), dataset_of(options)
    for batch in masked.sampler():
        (draw,) = batch
        bright, dark = (np.asarray(thumbnail(d.views.view(draw))).astype(int) for d in (plain, masked))
        half = bright.shape[1] // 2
        assert np.array_equal(dark[:, half + 20 :], bright[:, half + 20 :])
        assert np.abs(dark[:, : half - 20] - bright[:, : half - 20] / 4).max() <= 0.5
        assert panel_of(0, batch, masked.views, masked.repeats).tiles[0].marks == ("masked",)


def test_opaque_pictures_are_not_called_masked_and_those_of_latents_alone_have_their_captions(tmp_path):
    (folder := tmp_path / "train").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    (folder / "gone_0064x0064_sd.npz").touch()
    (tmp_path / "m.json").write_text('{"a": {"caption": "there"}, "gone": {"caption": "not there"}}', "utf-8")
    options = options_of(tmp_path, in_json=str(tmp_path / "m.json"), alpha_mask=True, cache_latents_to_disk=True)
    tiles = {tile.caption: tile for panel in panels_of(dataset_of(options)) for tile in panel.tiles}
    assert tiles["there"].marks == () and np.asarray(tiles["there"].picture)[0, 0].tolist() == [255, 0, 0]
    assert tiles["not there"].marks == ("only latents",) and tiles["not there"].picture.size == (256, 256)


@pytest.mark.parametrize(
    ("size_wh", "shown_wh"), [((512, 1024), (128, 256)), ((2048, 8), (256, 1)), ((100, 90), (200, 180))]
)
def test_a_thumbnail_fits_and_keeps_its_shape(size_wh, shown_wh):
    view = View("", False, np.zeros((*size_wh[::-1], 3), np.uint8), None)
    assert thumbnail(view).size == shown_wh


def test_the_first_batches_and_one_of_every_size_are_chosen(tmp_path):
    tiny.write_pictures(tmp_path / "train", "3_square", count=12)
    for index, height in enumerate((40, 48, 56)):
        Image.new("RGB", (128, height)).save(tmp_path / "train" / "3_square" / f"wide {index}.png")
    dataset = dataset_of(options_of(tmp_path))
    batches = list(dataset.sampler())
    numbers = chosen_batches(batches, dataset.views)
    assert numbers[:NUM_FIRST_BATCHES] == list(range(NUM_FIRST_BATCHES))
    assert numbers == sorted(numbers) and len(numbers) < len(batches)
    shown = {dataset.choices[batches[number][0].index].bucket_wh for number in numbers}
    assert shown == {choice.bucket_wh for choice in dataset.choices}
    assert num_buckets(batches, dataset.views) == len(shown)


def test_sheets_are_bounded(tmp_path):
    folder = tmp_path / "train" / "1_all"
    folder.mkdir(parents=True)
    for index in range(60):
        Image.new("RGB", (16 + 8 * index, 16)).save(folder / f"{index}.png")
        Image.new("RGB", (8, 8)).save(folder / f"small {index}.png")
    options = options_of(tmp_path, bucket_no_upscale=True, train_batch_size=50, resolution="128", min_bucket_reso=8)
    dataset = dataset_of(options)
    batches = list(dataset.sampler())
    assert len(chosen_batches(batches, dataset.views)) == MAX_BATCHES < num_buckets(batches, dataset.views)
    largest = max(panels_of(dataset), key=lambda panel: len(panel.tiles))
    assert (len(largest.tiles), largest.num_left_out) == (MAX_TILES, 50 - MAX_TILES)
    assert largest.title.endswith("8x8, 38 more")


def holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    left, top = cv2.minMaxLoc(cv2.matchTemplate(sheet, picture, cv2.TM_SQDIFF))[2]
    return np.array_equal(sheet[top : top + picture.shape[0], left : left + picture.shape[1]], picture)


def test_every_picture_is_on_a_sheet_whole_and_nothing_is_in_its_margin(mixed):
    dataset = dataset_of(options_of(mixed, train_batch_size=5))
    panels = panels_of(dataset)
    many = [replace(panel, number=number) for number in range(8) for panel in panels]
    sheets, _ = draw_sheets(many, "title")
    assert len(sheets) > 1
    arrays = [np.asarray(sheet) for sheet in sheets]
    for panel in panels:
        for tile in panel.tiles[-1:]:
            assert any(holds(sheet, np.asarray(tile.picture)) for sheet in arrays)
    for sheet in arrays:  # the margin is white all around
        for edge in (sheet[:24], sheet[-24:], sheet[:, :24], sheet[:, -24:]):
            assert (edge == 255).all()


def test_lines_fit_and_together_are_the_text():
    font, _ = font_for("", 14)
    for text in (f"1girl, {CHINESE}, long hair", "word " * 40, "a" * 200, "", "short"):
        lines = wrapped(text, font, 120, max_lines=100)
        assert all(font.getlength(line) <= 120 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert not any(line.startswith("，") for line in lines)
        cut = wrapped(text, font, 120, max_lines=2)
        assert len(cut) <= 2 and font.getlength(cut[-1]) <= 120
        assert cut[-1].endswith("...") == (len(lines) > 2)
    name = shortened("folder/a_long_name_of_a_picture_0001.png", font, 120)
    assert font.getlength(name) <= 120 and name.startswith("folder") and name.endswith("01.png")


def test_a_font_of_the_system_is_taken_where_pillows_own_lacks_characters():
    own = ImageFont.load_default(14)
    assert missing_characters(own, "abc, 12 é女é") == "é女"
    assert font_for("abc", 14)[0].getname() == own.getname()
    font, missing = font_for("é女", 14)
    if font.getname() == own.getname():
        pytest.skip("no font of the list is installed here")
    assert missing == missing_characters(font, "é女") and len(missing) < 2


def test_columns_stand_below_each_other_with_wide_characters():
    table = aligned([("name", "n", "caption"), ("图片", "10", "女"), ("abcdef", "2", "b")], numbers=(1,))
    assert table.splitlines() == ["name     n  caption", "------  --  -------", "图片    10  女", "abcdef   2  b"]


def run(folder: Path, model: Path, output: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = tiny.arguments(model, folder / "train", output, train_batch_size=2, seed=3, max_data_loader_n_workers=0)
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)} | environment
    words = [sys.executable, "-c", NO_MODELS, *arguments, "--debug_dataset", *more]
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60
    )


def test_the_script_shows_the_dataset_and_ends_without_loading_a_model(mixed, tiny_folder, tmp_path):
    output = tmp_path / "输出 folder"
    before = set(tmp_path.rglob("*"))
    result = run(mixed, tiny_folder, output)
    assert (result.returncode, [path.name for path in output.iterdir()]) == (0, ["lora-dataset-000001.png"])
    new = {path for path in tmp_path.rglob("*") if output not in (path, *path.parents)} - before
    assert {path.name for path in new} == {picture_index.NAME}
    assert "shown: 6 of 6 pictures with repeats, 3 of 3 batches, 2 of 2 sizes" in result.stdout
    assert result.stdout.count(CHINESE) == 6 and result.stdout.endswith("lora-dataset-000001.png\n")
    with Image.open(output / "lora-dataset-000001.png") as sheet:
        assert sheet.width > 2 * PICTURE
    first = (output / "lora-dataset-000001.png").read_bytes()
    assert run(mixed, tiny_folder, output).stdout == result.stdout
    assert (output / "lora-dataset-000001.png").read_bytes() == first


def test_only_one_process_of_several_draws(mixed, tiny_folder, tmp_path):
    result = run(mixed, tiny_folder, tmp_path / "out", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (result.returncode, result.stdout, (tmp_path / "out").exists()) == (0, "", False)


def test_characters_without_a_font_are_named(mixed, monkeypatch):
    monkeypatch.setattr(drawing, "SYSTEM_FONTS", ())
    _, missing = draw_sheets(panels_of(dataset_of(options_of(mixed))), "title")
    assert set(missing) == set(CHINESE) | set("图")
