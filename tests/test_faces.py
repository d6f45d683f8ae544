import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.dataset import TrainingDataset
from library.dataset.faces import Face, face_crop, face_of
from library.dataset.sampler import Draw
from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.options.derived import face_crop_range
from library.options.groups import DatasetOptions, TrainNetworkOptions

FACE = Face((300, 200), 50)


def crops(range_, at_random=False, image_wh=(800, 600), target_wh=(100, 100), face=FACE, count=200):
    """(scale, left, top) of many draws."""
    found = []
    for seed in range(count):
        resized_wh, left_top = face_crop(face, image_wh, target_wh, range_, random.Random(seed), at_random)
        assert all(0 <= at <= side - target for at, side, target in zip(left_top, resized_wh, target_wh, strict=True))
        found.append((resized_wh[0] / image_wh[0], *left_top))
    return found


def test_the_face_is_read_from_the_name():
    assert face_of(Path("a b_c_300_200_40_50.png")) == FACE
    assert [face_of(Path(n)) for n in ("300_200_40_50.png", "x_1_2_3.png", "x_1_2_3_y.png", "x_1_2_0_0.png")] == [
        None
    ] * 4


def test_the_crop_is_as_many_face_sizes_as_the_range_says_and_has_the_face_in_the_middle():
    found = crops((2.0, 4.0))
    sides = [100 / scale / 50 for scale, _, _ in found]  # the crop's side in face sizes
    assert 2.0 <= min(sides) < 2.1 and 3.9 < max(sides) <= 4.01
    for scale, left, top in found:
        assert abs((left + 50) / scale - 300) <= 1 / scale and abs((top + 50) / scale - 200) <= 1 / scale


def test_a_crop_is_never_beyond_the_picture_nor_enlarged_without_need():
    assert {scale for scale, _, _ in crops((0.1, 0.5))} == {1.0}
    assert {round(800 * scale) for scale, _, _ in crops((50, 90))} == {133}  # 100 pixels high
    assert {scale for scale, _, _ in crops((2, 4), image_wh=(50, 50), face=Face((10, 10), 5))} == {2.0}
    assert {left for _, left, _ in crops((2, 2), face=Face((5, 200), 50))} == {0}


def test_random_crop_moves_the_crop_around_the_face_and_every_draw_follows_its_seed():
    lefts = [left for _, left, _ in crops((2, 2), at_random=True, count=400)]
    assert min(lefts) < 50 and max(lefts) > 600
    assert sum(150 < left < 350 for left in lefts) > 0.4 * len(lefts)
    assert crops((2, 4), at_random=True) == crops((2, 4), at_random=True)


@pytest.mark.parametrize("text", ["2", "4,2", "a,b", "0,1", "1,2,3", "1,inf"])
def test_a_range_is_two_numbers_the_smaller_first(text):
    with pytest.raises(UserError, match=r"--face_crop_aug_range must be two numbers such as 2\.0,4\.0"):
        face_crop_range(TrainNetworkOptions(face_crop_aug_range=text))


def dataset_of(folder: Path, **options) -> TrainingDataset:
    options = {"resolution": "64", "face_crop_aug_range": "1.0,1.0", "alpha_mask": True} | options
    options = TrainNetworkOptions(train_data_dir=str(folder), **options)
    return TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)


@pytest.fixture
def picture_of_a_face(tmp_path: Path) -> Path:
    """A white opaque face of 64 pixels at the right edge of a black transparent picture."""
    pixels = np.zeros((128, 512, 4), np.uint8)
    pixels[32:96, 400:464] = 255
    (tmp_path / "1_x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "1_x" / "x_432_64_64_64.png")
    return tmp_path


def test_picture_and_mask_are_cut_around_the_face(picture_of_a_face):
    example = dataset_of(picture_of_a_face)[Draw(0, 0, epoch=1, step=0)]
    assert (example.image == 1).all() and (example.alpha_mask == 1).all()


def test_with_buckets_the_face_counts_for_nothing_and_a_note_says_so(picture_of_a_face):
    buckets = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 64}
    dataset = dataset_of(picture_of_a_face, **buckets)
    assert not (dataset[Draw(0, 0, epoch=1, step=0)].alpha_mask == 1).all()
    assert any("face_crop_aug_range has no effect" in note for note in dataset.scanned.notes)


def test_pictures_without_a_face_in_their_names_are_counted(picture_of_a_face):
    Image.new("RGB", (64, 64)).save(picture_of_a_face / "1_x" / "plain.png")
    (note,) = [note for note in dataset_of(picture_of_a_face).scanned.notes if "face_crop" in note]
    assert note.startswith("1 of 2 pictures")


def test_cached_latents_do_not_go_with_face_crops_unless_buckets_switch_these_off():
    cached = {"face_crop_aug_range": "2,4", "cache_latents": True, "resolution": "512"}
    assert any("face_crop" in problem for problem in DatasetOptions(**cached).check())
    assert not any("face_crop" in problem for problem in DatasetOptions(**cached, enable_bucket=True).check())
