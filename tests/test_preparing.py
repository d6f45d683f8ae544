"""Pictures before they are a dataset: resized, cropped, enlarged, unpacked, and those that are there twice."""

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image, ImageOps
from pyarrow import parquet

from library.dataset.buckets import choose_bucket
from library.dataset.picture_files import decode_pictures
from library.errors import UserError
from library.preparing import focus, jobs, unpacking
from library.preparing.cropping import crop_picture, whole_with_crop
from library.preparing.duplicates import joined
from library.preparing.picture_io import Picture, read_picture
from library.preparing.resizing import cut_to_multiple, resized_wh
from library.preparing.super_resolution import Upscaler, enlarged_in_tiles, spans
from library.preparing.upscaling import enlarged, wanted_wh
from tools import crop_images, extract_parquet, find_duplicates, resize_images_to_resolution, upscale_images

ORIENTATION = 0x112


def smooth(seed: int, size_wh: tuple[int, int]) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size_wh, Image.Resampling.BICUBIC)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A picture turned by EXIF, one with transparency, one of 16 bits, and a damaged one."""
    folder = tmp_path / "照片 folder"
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    smooth(0, (300, 400)).transpose(Image.Transpose.ROTATE_90).save(folder / "转 1.jpg", exif=exif, quality=95)
    (folder / "转 1.txt").write_text("一只猫", encoding="utf-8")
    (folder / "转 1.npz").write_bytes(b"latents of the old size")
    cut_out = smooth(1, (320, 240)).convert("RGBA")
    cut_out.putalpha(Image.linear_gradient("L").resize((320, 240)))
    cut_out.save(folder / "sub" / "b.png")
    Image.fromarray((np.arange(256 * 256, dtype=np.uint16)).reshape(256, 256)).save(folder / "c.png")
    (folder / "broken.png").write_bytes((folder / "c.png").read_bytes()[:500])
    return folder


def resize(source: Path, target: Path, *more: str) -> None:
    resize_images_to_resolution.main([str(source), str(target), *more])


def test_pictures_are_made_smaller_under_kohyas_names_and_the_damaged_one_is_named(photos, tmp_path):
    target = tmp_path / "小 out"
    sizes = "128x128,200x100"
    with pytest.raises(UserError, match=r"1 picture cannot be read: .*broken\.png"):
        resize(photos, target, "--max_resolution", sizes, "--divisible_by", "8", "--copy_associated_files")
    names = {path.relative_to(target).as_posix() for path in target.rglob("*.*") if path.name[0] != "."}
    assert names == {
        *("转 1+128x128.jpg", "转 1+128x128.txt", "转 1+200x100.jpg", "转 1+200x100.txt"),
        *("c+128x128.jpg", "c+200x100.jpg", "sub/b+128x128.jpg", "sub/b+200x100.jpg"),
    }
    # 128 * 128 pixels at 3:4 are 110.9 x 147.8, of which whole eights are kept
    assert size_of(target / "转 1+128x128.jpg") == (104, 144)
    assert (target / "转 1+200x100.txt").read_text(encoding="utf-8") == "一只猫"
    with Image.open(target / "转 1+128x128.jpg") as small:
        assert not small.getexif()
        upright = np.asarray(smooth(0, (300, 400)).resize((110, 147)), float)[1:145, 3:107]
        assert np.abs(np.asarray(small, float) - upright).mean() < 3


def test_a_smaller_picture_stays_as_it_is_unless_it_is_to_be_enlarged():
    assert resized_wh((100, 50), (512, 512), upscale=False) == (100, 50)
    assert resized_wh((100, 50), (200, 100), upscale=True) == (200, 100)
    assert resized_wh((1000, 1000), (512, 128), upscale=False) == (256, 256)
    assert cut_to_multiple(np.zeros((130, 70, 3)), 64).shape == (128, 64, 3)
    assert cut_to_multiple(np.zeros((30, 70, 3)), 64).shape == (30, 64, 3)


def test_a_rerun_makes_what_is_missing_or_old_and_never_mixes_settings(photos, tmp_path):
    (photos / "broken.png").unlink()
    target = tmp_path / "out"
    resize(photos, target, "--max_resolution", "64x64")
    made = {path: path.stat().st_mtime_ns for path in target.rglob("*.jpg")}
    (target / "c+64x64.jpg").unlink()
    smooth(5, (90, 90)).save(photos / "sub" / "b.png")  # newer than what was made of it
    resize(photos, target, "--max_resolution", "64x64")
    again = {path for path in target.rglob("*.jpg") if path.stat().st_mtime_ns != made[path]}
    assert again == {target / "c+64x64.jpg", target / "sub" / "b+64x64.jpg"}
    with pytest.raises(UserError, match="was made with other settings"):
        resize(photos, target, "--max_resolution", "64x64", "--quality", "50")
    resize(photos, target, "--max_resolution", "64x64", "--quality", "50", "--overwrite")

    (other := tmp_path / "other").mkdir()
    (other / "c+64x64.jpg").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="files that are not of this script"):
        resize(photos, other, "--max_resolution", "64x64")
    assert (other / "c+64x64.jpg").read_bytes() == b"somebody's"


def test_two_pictures_that_would_become_one_are_named(tmp_path):
    (source := tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg"):
        smooth(0, (80, 80)).save(source / name)
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would both become a\+64x64\.jpg"):
        resize(source, tmp_path / "out", "--max_resolution", "64x64")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="must be another folder"):
        resize(source, source)


def test_crops_have_the_size_or_the_buckets_of_training_and_keep_captions_and_transparency(photos, tmp_path):
    (photos / "broken.png").unlink()
    (photos / "c.png").rename(photos / "c.bmp.png")
    folders = ["--src_dir", str(photos), "--dst_dir"]
    crop_images.main([*folders, str(tmp_path / "size"), "--size", "128,192", "--sheet", str(tmp_path / "s.png")])
    sizes = {path.name: size_of(path) for path in (tmp_path / "size").rglob("*.*g")}
    assert sizes == {name: (128, 192) for name in ("转 1.jpg", "b.png", "c.bmp.png")}
    assert (tmp_path / "size" / "转 1.txt").exists() and not (tmp_path / "size" / "转 1.npz").exists()
    with Image.open(tmp_path / "size" / "sub" / "b.png") as cut_out:
        assert cut_out.mode == "RGBA" and cut_out.getchannel("A").getextrema()[0] < 10
    assert size_of(tmp_path / "s.png")[0] > 600

    buckets = ["--resolution", "256", "--min_bucket_reso", "128", "--max_bucket_reso", "512"]
    crop_images.main([*folders, str(tmp_path / "buckets"), *buckets])
    sizes = {path.name: size_of(path) for path in (tmp_path / "buckets").rglob("*.*g")}
    assert sizes == {"转 1.jpg": (192, 320), "b.png": (256, 256), "c.bmp.png": (256, 256)}


@pytest.mark.parametrize("spot_xy", [(30, 100), (170, 100), (270, 100)])
def test_a_crop_by_contrast_has_what_stands_out(spot_xy):
    pixels = np.full((200, 300, 3), 120, np.uint8)
    pixels += np.random.default_rng(0).integers(0, 4, pixels.shape, dtype=np.uint8)
    cv2.circle(pixels, spot_xy, 15, (230, 40, 40), -1)
    choice = choose_bucket((300, 200), [(256, 256)], (256, 256), 64, no_upscale=False)
    _, crop = crop_picture(Picture(pixels), choice, "subject", None)
    assert crop.around == "contrast"
    left = crop.left_top[0] * 200 / 256
    assert left <= spot_xy[0] - 12 and spot_xy[0] + 12 <= left + 200


def test_a_crop_around_something_found_has_it_in_its_middle_as_near_as_asked(monkeypatch):
    pixels = np.zeros((600, 900, 3), np.uint8)
    pixels[250:350, 600:700] = 255
    found = focus.Found("face", focus.Face((650, 300), 100))
    monkeypatch.setattr(focus, "find_face", lambda pixels: found)
    choice = choose_bucket((900, 600), [(128, 128)], (128, 128), 64, no_upscale=False)
    whole, crop = crop_picture(Picture(pixels), choice, "face", None)
    assert crop.resized_wh == (192, 128) and crop.left_top == (64, 0) and crop.enlarged < 1
    close, crop = crop_picture(Picture(pixels), choice, "face", zoom=2)
    ys, xs = np.nonzero(close.pixels[..., 0] > 128)
    assert (xs.mean().round(), ys.mean().round()) == (64, 64) and abs(np.ptp(xs) - 64) <= 1
    shown = np.asarray(whole_with_crop(pixels, crop, 300))  # a third of its size
    assert (shown[90:110, 205:228] == 255).all() and (shown[:60] == 0).all()


def test_opencvs_own_detectors_are_read_and_see_nothing_in_a_drawing():
    if not focus.has_detectors():
        pytest.skip("this OpenCV has no detectors")
    assert focus.find_subject(np.asarray(smooth(3, (400, 300)))) is None


def test_a_tiled_picture_is_the_whole_one_where_the_model_looks_no_further_than_the_overlap():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3, padding=1)]
    model = torch.nn.Sequential(*layers, torch.nn.PixelShuffle(2))  # sees 3 pixels around each
    image = torch.rand(1, 3, 70, 101)
    with torch.inference_mode():
        whole, tiled = model(image), enlarged_in_tiles(model, image, 2, tile=32, overlap=12)
    assert tiled.shape == whole.shape == (1, 3, 140, 202)
    # what a tile lacks near its edge, up to 3 of the 12 pixels that overlap, has a weight of at most a quarter
    assert (tiled - whole).abs().mean() < 0.002 and (tiled - whole).abs().max() < 0.25 * whole.abs().max()
    one_tile = enlarged_in_tiles(model, image, 2, tile=128, overlap=12)
    assert torch.equal(one_tile, whole)


def test_tiles_cover_the_picture_overlap_and_are_of_one_size():
    for length in (5, 31, 32, 33, 52, 53, 300):
        places = list(spans(length, 32, 12))
        assert places[0][0] == 0 and places[-1][1] == length
        assert {end - begin for begin, end in places} == {min(32, length)}
        assert all(before[1] - after[0] >= 12 for before, after in zip(places, places[1:], strict=False))


def test_neighbouring_tiles_fade_into_each_other():
    shades = iter([0.0, 1.0])
    image = torch.zeros(1, 3, 8, 52)
    out = enlarged_in_tiles(lambda tile: torch.full_like(tile, next(shades)), image, 1, tile=32, overlap=12)[0, 0, 0]
    assert (out[:20] == 0).all() and (out[32:] == 1).all()
    assert (out.diff()[20:31] > 0).all() and out.diff().max() < 0.1


def test_a_model_enlarges_as_often_as_it_takes_and_transparency_by_lanczos():
    nearest = torch.nn.Upsample(scale_factor=2, mode="nearest")
    upscaler = Upscaler(nearest, 2, "nearest", torch.device("cpu"))
    pixels = np.dstack([np.asarray(smooth(0, (20, 10))), np.full((10, 20), 77, np.uint8)])
    large = enlarged(pixels, (80, 40), lambda image: upscaler.enlarged(image, 16, 4))
    assert np.array_equal(large[..., :3], pixels[..., :3].repeat(4, 0).repeat(4, 1))
    assert large.shape == (40, 80, 4) and (large[..., 3] == 77).all()
    assert wanted_wh((100, 200), 2, None) == (200, 400)
    assert wanted_wh((100, 200), 2, (200, 400)) == (200, 400)
    assert wanted_wh((1000, 200), 2, (200, 400)) == (1000, 200)


def test_only_small_pictures_are_enlarged_and_the_others_copied_byte_by_byte(photos, tmp_path):
    (photos / "broken.png").unlink()
    arguments = ["--src_dir", str(photos), "--dst_dir", str(tmp_path / "out"), "--resolution", "300"]
    upscale_images.main(arguments)
    assert (tmp_path / "out" / "转 1.jpg").read_bytes() == (photos / "转 1.jpg").read_bytes()
    assert size_of(tmp_path / "out" / "c.png") == (300, 300)
    assert (tmp_path / "out" / "转 1.txt").exists()


def test_a_model_that_cannot_be_read_is_a_sentence_and_nothing_is_written(photos, tmp_path):
    (tmp_path / "m.pth").write_bytes(b"no model")
    with pytest.raises(UserError, match="--model"):
        arguments = ["--src_dir", str(photos), "--dst_dir", str(tmp_path / "out"), "--model", str(tmp_path / "m.pth")]
        upscale_images.main(arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--tile needs --model"):
        upscale_images.main(["--src_dir", str(photos), "--dst_dir", str(tmp_path / "out"), "--tile", "64"])


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """Two pictures: one is there again as a copy and made smaller, the other in another format under its name."""
    folder = tmp_path / "有重复"
    (folder / "sub").mkdir(parents=True)
    smooth(0, (400, 300)).save(folder / "a.png")
    (folder / "sub" / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "sub" / "copy.txt").write_text("caption")
    smooth(0, (200, 150)).save(folder / "small.jpg", quality=80)
    (folder / "small.txt").write_text("of the small one")
    smooth(1, (300, 300)).save(folder / "b.png")
    smooth(1, (300, 300)).save(folder / "b.jpg", quality=90)
    (folder / "b.txt").write_text("both")
    smooth(2, (300, 300)).save(folder / "alone.png")
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_duplicates_are_moved_with_their_captions_and_the_largest_stays(doubled, tmp_path, capsys):
    before = {path.read_bytes() for path in doubled.rglob("*.*")}
    away = doubled / "移走"
    (away / "small.jpg").parent.mkdir()
    (away / "small.jpg").write_bytes(b"of an earlier run")
    arguments = ["--src_dir", str(doubled), "--move_to", str(away), "--sheet", str(tmp_path / "s.png")]
    find_duplicates.main(arguments)
    shown = capsys.readouterr().out
    assert shown.count("duplicate") == 3 and shown.count("keep") == 2 and "400x300" in shown
    # of equals the one with a caption stays; the caption of b.png is that of b.jpg too
    stay = {"alone.png", "b.png", "b.txt", "sub/copy.png", "sub/copy.txt"}
    gone = {"移走/a.png", "移走/b.jpg", "移走/b.txt", "移走/small.jpg", "移走/small-2.jpg", "移走/small-2.txt"}
    assert files_in(doubled) == stay | gone
    assert before <= {path.read_bytes() for path in doubled.rglob("*.*") if path.is_file()}
    assert size_of(tmp_path / "s.png")[0] > 600
    find_duplicates.main(arguments)
    assert capsys.readouterr().out == ""


def test_only_the_same_bytes_count_where_that_is_asked_for(doubled, capsys):
    find_duplicates.main(["--src_dir", str(doubled), "--exact"])
    assert capsys.readouterr().out.count("duplicate") == 1
    assert joined([["b", "a"], ["c", "d"], ["e", "d"], ["f", "a"]]) == [["a", "b", "f"], ["c", "d", "e"]]


def picture_bytes(seed: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    smooth(seed, (40, 30)).save(data, format=kind)
    return data.getvalue()


def test_a_parquet_dataset_becomes_pictures_and_captions(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture_bytes(9))
    rows = [
        {"image": {"bytes": picture_bytes(0), "path": "train/猫.png"}, "text": " 一只猫 ", "source": "a"},
        {"image": {"bytes": picture_bytes(1, "JPEG"), "path": "../../猫.jpg"}, "text": None, "source": "b"},
        {"image": {"bytes": picture_bytes(2, "TIFF"), "path": None}, "text": "three", "source": "b"},
        {"image": {"bytes": None, "path": str(secret)}, "text": "x", "source": "b"},
        {"image": {"bytes": b"no picture", "path": "d.png"}, "text": "x", "source": "b"},
        {"image": {"bytes": picture_bytes(5, "WEBP"), "path": "CON.webp"}, "text": "y", "source": "b"},
    ]
    (source := tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), source / "train-00000-of-00001.parquet")
    target = tmp_path / "out" / "1_猫"
    for _ in range(2):  # and again, when nothing is left to be done
        with pytest.raises(UserError, match=r"2 pictures cannot be read: .*row 4 \(.*outside.*row 5 \(not a picture"):
            extract_parquet.main([str(source), str(target)])
    wanted = {"猫.png", "猫.txt", "猫-2.jpg", "000003.png", "000003.txt", "_CON.webp", "_CON.txt"}
    assert files_in(tmp_path / "out") == {f"1_猫/{name}" for name in wanted}
    assert (target / "猫.png").read_bytes() == picture_bytes(0)
    assert (target / "猫.txt").read_text(encoding="utf-8") == "一只猫"
    with pytest.raises(UserError, match="was made with other settings"):
        extract_parquet.main([str(source), str(target), "--format", "jpg"])
    with pytest.raises(UserError, match="--caption_column: there is no column prompt; there are text, source"):
        extract_parquet.main([str(source), str(tmp_path / "x"), "--caption_column", "prompt"])
    table = pyarrow.table({"image": [picture_bytes(0)], "one": ["x"], "two": ["y"]})
    parquet.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(UserError, match="--caption_column is needed, .*: one, two"):
        extract_parquet.main([str(tmp_path / "two.parquet"), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_is_unpacked_and_may_not_name_files_elsewhere(tmp_path, kind):
    source = tmp_path / "folder"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "猫.png").write_bytes(picture_bytes(0))
    (tmp_path / "outside.png").write_bytes(picture_bytes(1))

    def write(*names: str) -> None:
        rows = [{"file_name": name, "caption": f"a, {name}"} for name in names]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        if kind == "csv":
            text = "\n".join(["file_name,caption", *(f'{row["file_name"]},"{row["caption"]}"' for row in rows)])
        (source / f"metadata.{kind}").write_text(text, encoding="utf-8")

    write("sub/猫.png", "../outside.png")
    with pytest.raises(UserError, match=r"names pictures outside of .*\.\./outside\.png"):
        extract_parquet.main([str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    write("sub/猫.png")
    extract_parquet.main([str(source), str(tmp_path / "out"), "--format", "jpg"])
    assert files_in(tmp_path / "out") == {"猫.jpg", "猫.txt"}
    assert (tmp_path / "out" / "猫.txt").read_text(encoding="utf-8") == "a, sub/猫.png"


NAMES = [
    ("a/b/c.d.png", "c.d"),
    ("..\\..\\x.png", "x"),
    ("..", ""),
    ("/", ""),
    ("nul.png", "_nul"),
    ('a<:"|?*.jpg', "a______"),
]


@pytest.mark.parametrize(("path", "stem"), NAMES)
def test_names_from_elsewhere_are_made_fit_for_every_system(path, stem):
    assert unpacking.safe_stem(path) == stem


def test_a_picture_is_read_upright_with_its_transparency_and_its_own_colours(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    picture = smooth(0, (60, 40))
    profile = b"a profile of colours"
    picture.save(tmp_path / "a.png", exif=exif, icc_profile=profile)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    read = read_picture(tmp_path / "a.png")
    assert np.array_equal(read.pixels, upright) and read.colour_profile == profile
    assert decode_pictures([str(tmp_path / "a.png")])[0][str(tmp_path / "a.png")].size_wh == read.size_wh
    picture.convert("L").save(tmp_path / "grey.png", icc_profile=profile)
    assert read_picture(tmp_path / "grey.png").colour_profile is None  # it is RGB now


def test_ctrl_c_leaves_whole_files_and_what_is_left_for_the_next_run(photos, tmp_path, monkeypatch):
    (photos / "broken.png").unlink()
    monkeypatch.setattr(jobs, "MAX_THREADS", 1)
    calls = []

    def interrupted(job: jobs.Job) -> None:
        calls.append(job)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("library.preparing.resizing.copy_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resize(photos, tmp_path / "out", "--max_resolution", "64x64", "--copy_associated_files")
    for path in (tmp_path / "out").rglob("*.jpg"):
        assert read_picture(path).size_wh
    monkeypatch.undo()
    resize(photos, tmp_path / "out", "--max_resolution", "64x64", "--copy_associated_files")
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 3
