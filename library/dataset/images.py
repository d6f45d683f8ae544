"""Pictures as arrays: upright, RGB, resized, cropped, augmented. H W pixels."""

import random
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from library.dataset.picture_files import exif_orientation, open_picture

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CV2_INTERPOLATION = {
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
_PIL_INTERPOLATION = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


def load_image(
    path: str | Path | BinaryIO, keep_alpha: bool = False, at_least_wh: tuple[int, int] | None = None
) -> np.ndarray:
    """A picture upright as [H, W, 3] uint8 RGB, transparency on white; with keep_alpha [H, W, 4] as it is.

    Of a JPEG, a half, a quarter or an eighth of each side where that is `at_least_wh`, which is many times faster:
    the decoder leaves out the frequencies that would not be seen. The array is read-only: to copy it takes as long as
    to decode it.
    """
    with open_picture(path) as image:
        orientation = exif_orientation(image)
        if at_least_wh:
            image.draft(image.mode, at_least_wh if orientation < 5 else at_least_wh[::-1])  # of JPEGs only
        image = _eight_bits(image)
        if keep_alpha:
            image = image.convert("RGBA")
        elif image.has_transparency_data:
            image = _on_white(image.convert("RGBA"))
        else:
            image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image)


def resize_and_crop(
    image: np.ndarray,
    resized_wh: tuple[int, int],
    bucket_wh: tuple[int, int],
    interpolation: str | None = None,
    random_crop: random.Random | None = None,
    left_top: tuple[int, int] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture [H, W, C] at the size of its bucket, and left and top of the crop: centred unless given or random."""
    image = resize(image, resized_wh, interpolation)
    left, top = left_top or (
        _offset(image.shape[1] - bucket_wh[0], random_crop),
        _offset(image.shape[0] - bucket_wh[1], random_crop),
    )
    cropped = image[top : top + bucket_wh[1], left : left + bucket_wh[0]]
    return np.ascontiguousarray(cropped), (left, top)


def load_mask(path: str | Path, from_alpha: bool) -> np.ndarray:
    """A mask [H, W] uint8 upright: a picture's opacity, or a mask picture's red channel."""
    return np.ascontiguousarray(load_image(path, keep_alpha=from_alpha)[..., 3 if from_alpha else 0])


def fit_mask(
    mask: np.ndarray, resized_wh: tuple[int, int], bucket_wh: tuple[int, int], left_top: tuple[int, int]
) -> np.ndarray:
    """The mask [H, W] cut as its picture was, as float32 in [0, 1]."""
    mask = resize(mask, resized_wh)
    left, top = left_top
    return mask[top : top + bucket_wh[1], left : left + bucket_wh[0]].astype(np.float32) / 255


def resize(image: np.ndarray, size_wh: tuple[int, int], interpolation: str | None = None) -> np.ndarray:
    """The picture [H, W, C] at another size; by default area where it shrinks and Lanczos where a side grows."""
    height, width = image.shape[:2]
    if (width, height) == tuple(size_wh):
        return image
    if interpolation is None:
        interpolation = "area" if width >= size_wh[0] and height >= size_wh[1] else "lanczos"
    if interpolation in _PIL_INTERPOLATION:
        return np.array(Image.fromarray(image).resize(size_wh, _PIL_INTERPOLATION[interpolation]))
    return cv2.resize(image, size_wh, interpolation=_CV2_INTERPOLATION[interpolation])


def flip(image: np.ndarray) -> np.ndarray:
    """The picture [H, W, C] mirrored left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def color_augmented(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """In a third of the draws the RGB picture with its hue turned by up to 16 degrees or a gamma of 0.95 to 1.05."""
    if rng.random() > 0.33:
        return image
    if rng.random() > 0.5:
        return _hue_turned(image, degrees=2 * rng.uniform(-8, 8))
    return _with_gamma(image, rng.uniform(0.95, 1.05))


def to_model_input(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [3, H, W] float32 in [-1, 1]."""
    pixels = (image.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, which Pillow's own conversion would clip."""
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image).astype(np.float32)
    return Image.fromarray((grey.clip(0, 65535) / 257 + 0.5).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _offset(trim: int, random_crop: random.Random | None) -> int:
    return random_crop.randint(0, trim) if random_crop else trim // 2


def _hue_turned(image: np.ndarray, degrees: float) -> np.ndarray:
    hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)  # hue in degrees
    hsv[..., 0] = (hsv[..., 0] + degrees) % 360
    return _to_bytes(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _with_gamma(image: np.ndarray, gamma: float) -> np.ndarray:
    return _to_bytes((image.astype(np.float32) / 255) ** gamma)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)
