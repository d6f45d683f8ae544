"""One picture cropped to a size, around what is in it."""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from library.dataset.buckets import BucketChoice
from library.dataset.config import Size
from library.dataset.faces import face_crop
from library.dataset.images import resize_and_crop
from library.panels import ORANGE, fitted
from library.preparing import focus
from library.preparing.picture_io import Picture

CENTRE, CONTRAST = "centre", "contrast"
AS_LARGE_AS_FITS = float("inf")  # a crop, in sizes of what it is around
DIMMED = 0.35  # share of its light that is left to what is cut off


@dataclass(frozen=True)
class Crop:
    """How a picture was cropped."""

    image_wh: Size
    resized_wh: Size  # of the whole picture, of which the crop is cut out
    left_top: tuple[int, int]
    target_wh: Size
    around: str  # "centre", "contrast", or what was found: "face", "cat's face", "person"

    @property
    def enlarged(self) -> float:
        """By how much the picture was enlarged; 1 and below where it was not."""
        return self.resized_wh[0] / self.image_wh[0]

    @property
    def share_cut(self) -> float:
        """How much of the picture is not in the crop."""
        return 1 - self.target_wh[0] * self.target_wh[1] / (self.resized_wh[0] * self.resized_wh[1])


def crop_picture(picture: Picture, choice: BucketChoice, around: str, zoom: float | None) -> tuple[Picture, Crop]:
    """The picture at the size that was chosen for it, cropped around its centre, "face" or "subject".

    The crop is as large as the picture allows, or its shorter side is `zoom` times the longer one of what was found,
    as far as the picture covers it and is not enlarged for it. Where nothing is found, it goes by contrast.
    """
    resized_wh, target_wh = choice.resized_wh, choice.bucket_wh
    left_top = ((resized_wh[0] - target_wh[0]) // 2, (resized_wh[1] - target_wh[1]) // 2)
    if around != CENTRE:
        pixels = picture.opaque
        found = focus.find_face(pixels) if around == "face" else focus.find_subject(pixels)
        around = found.what if found else CONTRAST
        if found:
            reach = zoom or AS_LARGE_AS_FITS
            rng = random.Random(0)  # which draws nothing between equal bounds
            resized_wh, left_top = face_crop(found.at, picture.size_wh, target_wh, (reach, reach), rng, at_random=False)
        else:
            left_top = focus.place_of_contrast(pixels, resized_wh, target_wh)
    cropped, left_top = resize_and_crop(picture.pixels, resized_wh, target_wh, left_top=left_top)
    return picture.with_pixels(cropped), Crop(picture.size_wh, resized_wh, left_top, target_wh, around)


def whole_with_crop(pixels: np.ndarray, crop: Crop, longest_side: int) -> Image.Image:
    """A small picture [H, W, 3] of the whole, dark where it is cut off, with a frame around the crop."""
    whole = fitted(Image.fromarray(pixels), longest_side)
    scale_x, scale_y = (small / side for small, side in zip(whole.size, crop.resized_wh, strict=True))
    (left, top), (width, height) = crop.left_top, crop.target_wh
    left, right = round(left * scale_x), round((left + width) * scale_x)
    top, bottom = round(top * scale_y), round((top + height) * scale_y)
    shown = whole.point(lambda value: round(value * DIMMED))
    shown.paste(whole.crop((left, top, right, bottom)), (left, top))
    ImageDraw.Draw(shown).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=ORANGE, width=2)
    return shown
