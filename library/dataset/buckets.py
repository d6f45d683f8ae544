"""Aspect-ratio buckets: which size each picture is trained at, and the order in which batches are drawn."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.dataset.config import Size, SubsetOptions
from library.dataset.scan import ImageRecord, ScannedDataset
from library.errors import UserError, quoted_list
from library.options.derived import resolution_wh

MAX_DRAWS = 10**8  # in an epoch: their order is kept in memory
MAX_PIXELS = 10**8  # of a picture as it is resized, before it is cropped


@dataclass(frozen=True)
class BucketSettings:
    """The bucket flags, rounded to whole steps."""

    resolution_wh: Size  # its area is the most a bucket may have
    resolutions: list[Size]  # the buckets, not used with no_upscale
    step: int
    no_upscale: bool


@dataclass(frozen=True)
class BucketChoice:
    """How one picture becomes the size of its bucket."""

    bucket_wh: Size
    resized_wh: Size  # covers the bucket; the rest is cropped
    ar_error: float  # width/height of the bucket less that of the picture
    crop_ltrb: tuple[float, float, float, float]  # kohya's size condition for SDXL, not the crop really made


def bucket_settings(options: Any) -> BucketSettings:
    """The bucket settings that the flags mean; without bucketing there is one bucket, the resolution."""
    size_wh, step = resolution_wh(options), options.bucket_reso_steps
    if not options.enable_bucket:
        if any(side % 8 for side in size_wh):
            raise UserError(f"--resolution must be a multiple of 8 without --enable_bucket, got {options.resolution}")
        return BucketSettings(size_wh, [size_wh], step, no_upscale=False)
    min_size = max(options.min_bucket_reso // step, 1) * step
    max_size = math.ceil(options.max_bucket_reso / step) * step
    return BucketSettings(
        size_wh, bucket_resolutions(size_wh, min_size, max_size, step), step, options.bucket_no_upscale
    )


def bucket_resolutions(resolution_wh: Size, min_size: int, max_size: int, step: int) -> list[Size]:
    """All bucket sizes in whole steps whose area is at most that of the resolution, sorted by width, height."""
    area = resolution_wh[0] * resolution_wh[1]
    square = int(math.sqrt(area) // step) * step
    sizes = {(square, square)} if square else set()
    for width in range(min_size, max_size + 1, step):
        height = min(max_size, area // width // step * step)
        if height >= min_size:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_buckets_of(scanned: ScannedDataset) -> list[BucketChoice]:
    """The bucket of every record, by the settings of its dataset."""
    choices: dict[int, BucketChoice] = {}
    for number, spec in enumerate(scanned.specs):
        mine = [i for i, r in enumerate(scanned.records) if scanned.subsets[r.subset].dataset == number]
        chosen = choose_buckets([scanned.records[i] for i in mine], bucket_settings(spec))
        choices.update(zip(mine, chosen, strict=True))
    return [choices[index] for index in range(len(scanned.records))]


def repeats_of(scanned: ScannedDataset) -> list[int]:
    """How often each record is drawn in an epoch; regularisation is balanced within each dataset."""
    repeats = [0] * len(scanned.records)
    for number in range(len(scanned.specs)):
        mine = [i for i, r in enumerate(scanned.records) if scanned.subsets[r.subset].dataset == number]
        counts = registered_repeats([scanned.records[i] for i in mine], scanned.subsets)
        for index, count in zip(mine, counts, strict=True):
            repeats[index] = count
    return repeats


def choose_bucket(image_wh: Size, resolutions: list[Size], max_wh: Size, step: int, no_upscale: bool) -> BucketChoice:
    """The bucket nearest in aspect ratio; with no_upscale the picture's own size in whole steps instead."""
    aspect = image_wh[0] / image_wh[1]
    if no_upscale:
        resized_wh = _shrunk_to_area(image_wh, max_wh[0] * max_wh[1], step)
        bucket_wh = (resized_wh[0] // step * step, resized_wh[1] // step * step)
    elif image_wh in resolutions:
        bucket_wh = resized_wh = image_wh
    else:
        bucket_wh = min(resolutions, key=lambda size: abs(size[0] / size[1] - aspect))
        resized_wh = _covering(image_wh, bucket_wh)
    if 0 in bucket_wh:
        return BucketChoice(bucket_wh, resized_wh, 0.0, (0.0, 0.0, 0.0, 0.0))
    return BucketChoice(bucket_wh, resized_wh, bucket_wh[0] / bucket_wh[1] - aspect, _size_condition(bucket_wh, aspect))


def choose_buckets(records: Sequence[ImageRecord], settings: BucketSettings) -> list[BucketChoice]:
    """The bucket of every picture; without bucketing all get the resolution itself."""
    choice_of = {
        size_wh: choose_bucket(
            size_wh, settings.resolutions, settings.resolution_wh, settings.step, settings.no_upscale
        )
        for size_wh in {record.size_wh for record in records}
    }
    choices = [choice_of[record.size_wh] for record in records]
    if too_long := [str(r.path) for r, choice in zip(records, choices, strict=True) if _area(choice) > MAX_PIXELS]:
        raise UserError(
            f"pictures that are too narrow to be cropped to a bucket, as they would be enlarged to more than "
            f"{MAX_PIXELS // 10**6} million pixels: {quoted_list(too_long)}; cut or remove them"
        )
    if too_small := [str(r.path) for r, choice in zip(records, choices, strict=True) if 0 in choice.bucket_wh]:
        raise UserError(
            f"--bucket_no_upscale needs pictures of at least {settings.step} pixels a side (--bucket_reso_steps); "
            f"remove or enlarge {quoted_list(too_small)}"
        )
    return choices


def registered_repeats(records: Sequence[ImageRecord], subsets: Sequence[SubsetOptions]) -> list[int]:
    """How often each picture is drawn in an epoch; regularisation pictures go round until they match the others."""
    repeats = [0 if subsets[r.subset].is_reg else subsets[r.subset].num_repeats for r in records]
    num_train = sum(repeats)
    if num_train > MAX_DRAWS:
        raise UserError(f"the pictures, times their repeats, are {num_train} an epoch; there may be {MAX_DRAWS}")
    reg = [index for index, record in enumerate(records) if subsets[record.subset].is_reg]
    num_reg = 0
    first_round = True
    while reg and num_reg < num_train:
        for index in reg:
            if num_reg >= num_train:
                break
            more = subsets[records[index].subset].num_repeats if first_round else 1
            repeats[index] += more
            num_reg += more
        first_round = False
    return repeats


def bucket_info(choices: Sequence[BucketChoice], repeats: Sequence[int]) -> dict[str, Any]:
    """Buckets and their pictures, counted with repeats, as kohya's metadata has them."""
    counts: Counter[Size] = Counter()
    for choice, num_repeats in zip(choices, repeats, strict=True):
        counts[choice.bucket_wh] += num_repeats
    filled = sorted(size for size, count in counts.items() if count)
    errors = [abs(choice.ar_error) for choice, num_repeats in zip(choices, repeats, strict=True) if num_repeats]
    return {
        "buckets": {str(i): {"resolution": list(size), "count": counts[size]} for i, size in enumerate(filled)},
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def _area(choice: BucketChoice) -> int:
    return choice.resized_wh[0] * choice.resized_wh[1]


def _covering(image_wh: Size, bucket_wh: Size) -> Size:
    """The picture's size scaled so that it just covers the bucket."""
    width, height = image_wh
    scale = bucket_wh[1] / height if width / height > bucket_wh[0] / bucket_wh[1] else bucket_wh[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def _shrunk_to_area(image_wh: Size, max_area: int, step: int) -> Size:
    """The picture's size, shrunk if it is over the area so that one side is a whole number of steps."""
    width, height = image_wh
    if width * height <= max_area:
        return image_wh
    aspect = width / height
    ideal_width = math.sqrt(max_area * aspect)
    by_width = _whole_steps(ideal_width, step)
    by_height = _whole_steps(max_area / ideal_width, step)
    height_of_width = _whole_steps(by_width / aspect, step)
    width_of_height = _whole_steps(by_height * aspect, step)
    if _ratio_error(by_width, height_of_width, aspect) < _ratio_error(width_of_height, by_height, aspect):
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _ratio_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf


def _whole_steps(length: float, step: int) -> int:
    return int(length + 0.5) // step * step


def _size_condition(bucket_wh: Size, aspect: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the picture fitted inside the bucket."""
    width, height = bucket_wh
    if width / height > aspect:
        fitted_width, fitted_height = height * aspect, float(height)
    else:
        fitted_width, fitted_height = float(width), width / aspect
    left, top = (width - fitted_width) // 2, (height - fitted_height) // 2
    return left, top, left + fitted_width, top + fitted_height
