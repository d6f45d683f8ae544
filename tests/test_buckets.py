import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.dataset.buckets import (
    bucket_info,
    bucket_resolutions,
    bucket_settings,
    choose_bucket,
    choose_buckets,
    registered_repeats,
)
from library.dataset.config import SubsetOptions
from library.dataset.sampler import BucketSampler
from library.dataset.scan import ImageRecord
from library.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "data/bucketing_and_caption_golden.json").read_text(encoding="utf-8"))
BUCKETED = [case for case in GOLDEN["select"] if "reso" in case]
NOT_BUCKETED = [case for case in GOLDEN["select"] if "reso" not in case]


def options(**changes):
    defaults = {
        "resolution": "512",
        "enable_bucket": True,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_reso_steps": 64,
        "bucket_no_upscale": False,
    }
    return SimpleNamespace(**(defaults | changes))


def record(size_wh=(64, 64), subset=0):
    return ImageRecord("x.png", size_wh, "", False, subset)


@pytest.mark.parametrize("name", GOLDEN["bucket_lists"])
def test_bucket_list_is_kohyas(name):
    resolution, min_size, max_size, step = name.split("_")
    width, height = resolution.split("x")
    sizes = bucket_resolutions((int(width), int(height)), int(min_size[3:]), int(max_size[3:]), int(step[4:]))
    assert [list(size) for size in sizes] == GOLDEN["bucket_lists"][name]


def case_name(case):
    return "-".join(str(case[key]) for key in ("reso", "steps", "no_upscale", "image") if key in case)


@pytest.mark.parametrize("case", BUCKETED, ids=case_name)
def test_bucket_choice_is_kohyas(case):
    resolution = tuple(case["reso"])
    sizes = bucket_resolutions(resolution, case["min"], case["max"], case["steps"])
    choice = choose_bucket(tuple(case["image"]), sizes, resolution, case["steps"], case["no_upscale"])
    assert list(choice.bucket_wh) == case["bucket"]
    assert list(choice.resized_wh) == case["resized"]
    assert choice.ar_error == pytest.approx(case["ar_error"], abs=1e-8)
    assert list(choice.crop_ltrb) == pytest.approx(case["crop_ltrb"], abs=1e-9)


@pytest.mark.parametrize("case", NOT_BUCKETED, ids=case_name)
def test_without_buckets_all_pictures_cover_the_resolution(case):
    settings = bucket_settings(options(enable_bucket=False, resolution="512,512"))
    (choice,) = choose_buckets([record(tuple(case["image"]))], settings)
    assert list(choice.bucket_wh) == case["bucket"]
    assert list(choice.resized_wh) == case["resized"]


def test_bucket_limits_are_rounded_to_whole_steps_outwards():
    settings = bucket_settings(options(min_bucket_reso=300, max_bucket_reso=700))
    assert min(w for w, h in settings.resolutions) == 256
    assert max(w for w, h in settings.resolutions) == 704


def test_resolution_without_buckets_must_fit_the_latents():
    with pytest.raises(UserError, match="--resolution must be a multiple of 8.*500"):
        bucket_settings(options(enable_bucket=False, resolution="500"))


def test_picture_below_one_step_is_named_when_it_may_not_be_enlarged():
    settings = bucket_settings(options(bucket_no_upscale=True))
    with pytest.raises(UserError, match="at least 64 pixels.*x.png"):
        choose_buckets([record((100, 50))], settings)


@pytest.mark.parametrize(
    ("num_train", "train_repeats", "num_reg", "reg_repeats", "expected_reg"),
    [
        (8, 1, 2, 1, [4, 4]),
        (5, 1, 2, 1, [3, 2]),
        (2, 1, 4, 1, [1, 1, 0, 0]),
        (5, 1, 3, 3, [3, 3, 0]),
        (0, 1, 2, 1, [0, 0]),
        (3, 2, 0, 1, []),
    ],
)
def test_regularisation_pictures_go_round_until_they_match(
    num_train, train_repeats, num_reg, reg_repeats, expected_reg
):
    subsets = [
        SubsetOptions(image_dir=Path("a"), num_repeats=train_repeats),
        SubsetOptions(image_dir=Path("b"), num_repeats=reg_repeats, is_reg=True),
    ]
    records = [record(subset=0)] * num_train + [record(subset=1)] * num_reg
    assert registered_repeats(records, subsets) == [train_repeats] * num_train + expected_reg


def test_eight_training_and_two_regularisation_pictures_make_sixteen_items():
    subsets = [SubsetOptions(image_dir=Path("a")), SubsetOptions(image_dir=Path("b"), is_reg=True)]
    assert sum(registered_repeats([record(subset=0)] * 8 + [record(subset=1)] * 2, subsets)) == 16


def test_bucket_info_counts_repeats_of_filled_buckets():
    settings = bucket_settings(options())
    choices = choose_buckets([record((640, 480)), record((512, 512)), record((100, 900))], settings)
    info = bucket_info(choices, [2, 3, 0])
    assert info["buckets"] == {
        "0": {"resolution": [512, 512], "count": 3},
        "1": {"resolution": [576, 448], "count": 2},
    }
    assert info["mean_img_ar_error"] == pytest.approx((640 / 480 - 576 / 448) / 2)
    json.dumps(info)


BUCKET_OF = [(512, 512), (512, 512), (576, 448), (448, 576), (512, 512)]
REPEATS = [2, 3, 5, 1, 0]
PINNED_ORDER = [[2], [1], [0, 0], [1, 1], [3], [2, 2], [2, 2]]
PINNED_SEED = 6659141508809006324


def draws(seed=1, epoch=1, **changes):
    sampler = BucketSampler(BUCKET_OF, REPEATS, **({"batch_size": 2, "seed": seed} | changes))
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_record_is_drawn_as_often_as_it_repeats():
    drawn = [draw.index for batch in draws() for draw in batch]
    assert [drawn.count(index) for index in range(5)] == REPEATS


def test_batches_do_not_mix_buckets_and_only_the_last_of_a_bucket_is_short():
    batches = draws()
    assert all(len({BUCKET_OF[draw.index] for draw in batch}) == 1 for batch in batches)
    assert len(batches) == len(BucketSampler(BUCKET_OF, REPEATS, 2, 1)) == math.ceil(5 / 2) * 2 + 1
    assert sorted(len(batch) for batch in batches) == [1, 1, 1, 2, 2, 2, 2]


def test_order_depends_on_seed_and_epoch_alone():
    random.seed(3)
    first = draws()
    random.seed(4)
    assert draws() == first
    assert draws(epoch=2) != first
    assert draws(seed=2) != first


def test_order_is_the_same_in_every_version():
    assert [[draw.index for draw in batch] for batch in draws()] == PINNED_ORDER
    assert draws()[0][0].seed == PINNED_SEED


def test_seeds_of_draws_are_distinct_and_fit_63_bits():
    seeds = [draw.seed for epoch in (1, 2, 3) for batch in draws(epoch=epoch) for draw in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_know_their_optimizer_step():
    assert [batch[0].step for batch in draws()] == list(range(7))
    assert [batch[0].step for batch in draws(epoch=2, gradient_accumulation_steps=2)] == [4, 4, 5, 5, 6, 6, 7]
