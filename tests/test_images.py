import random

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from library.dataset.images import color_augmented, flip, load_image, resize, resize_and_crop, to_model_input

WHITE = (255, 255, 255)


def gradient(size_wh=(48, 32)):
    """A picture none of whose mirrorings and rotations equals another."""
    xs, ys = np.meshgrid(np.arange(size_wh[0]), np.arange(size_wh[1]))
    return np.stack([xs * 4, ys * 6, (xs + ys) * 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(load_image(tmp_path / "x.png"), upright)


def test_rgb_is_read_as_it_is(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "图 🦊.png")
    assert np.array_equal(load_image(tmp_path / "图 🦊.png"), gradient())


def test_transparent_pixels_become_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[1, 1] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png")
    assert tuple(image[0, 0]) == (10, 20, 30)
    assert tuple(image[1, 1]) == (127, 127, 127)
    assert tuple(image[3, 3]) == WHITE
    assert np.array_equal(load_image(tmp_path / "x.png", keep_alpha=True), rgba)


def test_opaque_alpha_changes_nothing(tmp_path):
    Image.fromarray(gradient()).convert("RGBA").save(tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png"), gradient())


def test_transparent_colour_of_a_palette_becomes_white(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "x.png", transparency=0)
    image = load_image(tmp_path / "x.png")
    assert tuple(image[0, 1]) == (200, 10, 20)
    assert tuple(image[3, 3]) == WHITE


def test_grey_with_alpha_becomes_rgb_on_white(tmp_path):
    Image.fromarray(np.array([[[60, 255], [60, 0]]], np.uint8)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").tolist() == [[[60, 60, 60], [255, 255, 255]]]


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png"), np.array(image.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert np.abs(load_image(tmp_path / "x.jpg").astype(int) - (200, 30, 30)).max() <= 4


@pytest.mark.parametrize(
    "extension",
    [".webp", pytest.param(".avif", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF"))],
)
def test_newer_formats_are_read(tmp_path, extension):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / f"x{extension}")
    assert np.abs(load_image(tmp_path / f"x{extension}").astype(int) - (200, 30, 30)).max() <= 8


def test_picture_of_its_own_size_is_not_resampled():
    image = gradient()
    assert resize(image, (48, 32)) is image


def test_default_is_area_to_shrink_and_lanczos_where_a_side_grows():
    image = gradient()
    assert np.array_equal(resize(image, (24, 16)), cv2.resize(image, (24, 16), interpolation=cv2.INTER_AREA))
    lanczos = np.array(Image.fromarray(image).resize((60, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(resize(image, (60, 16)), lanczos)


@pytest.mark.parametrize(
    "interpolation", ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
)
def test_every_interpolation_gives_the_size_asked_for(interpolation):
    assert resize(gradient(), (40, 40), interpolation).shape == (40, 40, 3)


def test_crop_is_centred():
    image, left_top = resize_and_crop(gradient(), (48, 32), (32, 25))
    assert left_top == (8, 3)
    assert np.array_equal(image, gradient()[3:28, 8:40])


def test_random_crop_reaches_every_offset_and_follows_its_seed():
    def offsets(seed):
        rng = random.Random(seed)
        return [resize_and_crop(gradient(), (48, 32), (46, 31), None, rng)[1] for _ in range(60)]

    assert set(offsets(0)) == {(left, top) for left in range(3) for top in range(2)}
    assert offsets(0) == offsets(0)


def test_flip_mirrors_left_to_right():
    assert np.array_equal(flip(gradient()), gradient()[:, ::-1])


def test_colour_augmentation_changes_a_third_of_the_pictures_a_little():
    image = np.full((2, 2, 3), (180, 90, 60), np.uint8)
    results = [color_augmented(image, random.Random(seed)) for seed in range(1000)]
    changed = [result for result in results if not np.array_equal(result, image)]
    assert 0.25 < len(changed) / 1000 < 0.36
    assert max(np.abs(result.astype(int) - image).max() for result in changed) <= 40


def test_colour_augmentation_keeps_black_white_and_grey():
    image = np.repeat(np.array([[[0], [255]]], np.uint8), 3, axis=-1)
    assert all(np.array_equal(color_augmented(image, random.Random(seed)), image) for seed in range(100))


def test_model_input_runs_from_minus_one_to_one():
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = (255, 0, 51)
    pixels = to_model_input(image)
    assert (pixels.shape, pixels.dtype) == ((3, 2, 3), np.float32)
    assert pixels[:, 0, 0] == pytest.approx([1, -1, -0.6])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_fast_jpeg_is_no_smaller_than_asked_for_and_looks_the_same(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((800, 600), Image.BICUBIC)
    noise.save(tmp_path / "x.jpg", exif=exif, quality=95)
    wanted_wh = (190, 140) if orientation == 1 else (140, 190)
    fast = load_image(tmp_path / "x.jpg", at_least_wh=wanted_wh)
    assert fast.shape == ((150, 200, 3) if orientation == 1 else (200, 150, 3))  # a quarter; an eighth is too small
    small, full = (resize(image, wanted_wh) for image in (fast, load_image(tmp_path / "x.jpg")))
    assert np.abs(small.astype(int) - full).mean() < 1.5


def test_only_jpegs_are_read_fast(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png", at_least_wh=(6, 4)), gradient())
