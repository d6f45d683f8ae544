import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.cache import write_latents
from library.dataset.config import SubsetOptions, spec_from_flags
from library.dataset.dataset import TrainingDataset, collate
from library.dataset.sampler import Draw
from library.dataset.scan import scan
from library.errors import UserError
from library.options.groups import TrainNetworkOptions


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for folder, sizes in {"2_cat": [(100, 80), (63, 64)], "1_animal": [(70, 64)]}.items():
        (tmp_path / folder).mkdir()
        for i, (width, height) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.caption").write_text("cat, a, b, c, d")
    return tmp_path


def build(folders, reg=False, enable_bucket=True, batch_size=1, fast_jpeg=False, **subset_options):
    subsets = [SubsetOptions(image_dir=folders / "2_cat", num_repeats=2, **subset_options)]
    if reg:
        subsets.append(SubsetOptions(image_dir=folders / "1_animal", is_reg=True))
    options = TrainNetworkOptions(
        resolution="64",
        enable_bucket=enable_bucket,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=8,
        train_batch_size=batch_size,
        prior_loss_weight=0.25,
        fast_jpeg=fast_jpeg,
    )
    scanned = replace(scan(subsets), specs=[spec_from_flags(options)])
    return TrainingDataset(scanned, options, seed=7, max_train_steps=10)


def examples(dataset, epoch=1):
    sampler = dataset.sampler()
    sampler.set_epoch(epoch)
    return [dataset[draw] for batch in sampler for draw in batch]


def draw(index, seed=0):
    return Draw(index, seed, epoch=1, step=0)


def latents_like(dataset, index, value):
    width, height = dataset.choices[index].bucket_wh
    return torch.full((4, height // 8, width // 8), float(value))


AUGMENTED = {"flip_aug": True, "random_crop": True, "color_aug": True, "shuffle_caption": True}


def test_batches_have_pictures_of_their_bucket_and_its_sizes(folders):
    dataset = build(folders)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=dataset.sampler(), collate_fn=collate)
    batches = list(loader)
    assert sum(len(batch.captions) for batch in batches) == len(dataset) == 4
    for batch in batches:
        (target,) = {tuple(size) for size in batch.target_sizes_hw.tolist()}
        assert batch.images.shape == (len(batch.captions), 3, *target)
        assert (batch.images.min() >= -1, batch.images.max() <= 1) == (True, True)
        assert batch.latents is None
        assert batch.captions[0] == "cat, a, b, c, d"
    assert sorted({tuple(size) for batch in batches for size in batch.original_sizes_hw.tolist()}) == [
        (64, 63),
        (80, 100),
    ]


def test_everything_random_follows_the_draws_seed(folders):
    dataset = build(folders, **AUGMENTED)
    torch.manual_seed(1)
    first = examples(dataset)
    torch.manual_seed(2)
    for one, other in zip(first, examples(dataset), strict=True):
        assert one.caption == other.caption
        assert torch.equal(one.image, other.image)
    assert any(not torch.equal(a.image, b.image) for a, b in zip(first, examples(dataset, epoch=2), strict=True))


def test_worker_processes_give_the_same_batches(folders):
    dataset = build(folders, **AUGMENTED)

    def batches(num_workers):
        sampler = dataset.sampler()
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers
        )
        return list(loader)

    for here, there in zip(batches(0), batches(2), strict=True):
        assert here.captions == there.captions
        assert torch.equal(here.images, there.images)


def test_dataset_can_be_pickled_for_spawned_workers(folders):
    dataset = build(folders, **AUGMENTED)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[draw(0)].image, dataset[draw(0)].image)


def test_regularisation_pictures_have_the_prior_loss_weight(folders):
    dataset = build(folders, reg=True)
    assert (dataset.num_train_images, dataset.num_reg_images, dataset.repeats) == (4, 1, [2, 2, 4])
    batch = collate([dataset[draw(1)], dataset[draw(2)]])
    assert batch.loss_weights.tolist() == [1.0, 0.25]


def test_flipped_picture_has_the_crop_measured_from_the_other_side(folders):
    dataset = build(folders, flip_aug=True)
    straight, choice = dataset.image(1), dataset.choices[1]
    left, top, right, _ = choice.crop_ltrb
    for seed in range(20):
        example = dataset[draw(1, seed)]
        flipped = not torch.equal(example.image, straight)
        assert example.crop_top_left == (int(top), int(choice.bucket_wh[0] - right if flipped else left))


def test_flips_are_half_of_the_draws(folders):
    dataset = build(folders, flip_aug=True)
    straight = dataset.image(0)
    flips = [torch.equal(dataset[draw(0, seed)].image, straight.flip(-1)) for seed in range(100)]
    assert 35 < sum(flips) < 65
    assert all(flip or torch.equal(dataset[draw(0, s)].image, straight) for s, flip in enumerate(flips))


def test_without_buckets_pictures_cover_the_resolution(folders):
    dataset = build(folders, enable_bucket=False)
    batch = collate([dataset[draw(0)], dataset[draw(1)]])
    assert batch.images.shape == (2, 3, 64, 64)


def test_latents_in_memory_replace_the_picture(folders):
    dataset = build(folders, flip_aug=True, shuffle_caption=True)
    captions = [dataset[draw(0, seed)].caption for seed in range(10)]
    sizes = [dataset[draw(0, seed)].crop_top_left for seed in range(10)]
    dataset.latents[0] = dataset.cached_latents(
        0, latents_like(dataset, 0, 1).numpy(), latents_like(dataset, 0, 2).numpy()
    )
    (folders / "2_cat" / "0.png").unlink()
    cached = [dataset[draw(0, seed)] for seed in range(10)]
    assert [example.caption for example in cached] == captions
    assert [example.crop_top_left for example in cached] == sizes
    assert {example.latents.unique().item() for example in cached} == {1.0, 2.0}
    batch = collate(cached)
    assert batch.images is None
    assert batch.latents.shape == (10, *latents_like(dataset, 0, 0).shape)


def test_latents_on_disk_replace_the_picture(folders, tmp_path):
    dataset = build(folders)
    cached = dataset.latents[0] = dataset.cached_latents(0, latents_like(dataset, 0, 3).numpy())
    in_memory = dataset[draw(0)]
    dataset.latents.clear()
    write_latents(tmp_path / "0.npz", cached)
    dataset.latents_paths[0] = tmp_path / "0.npz"
    from_disk = dataset[draw(0)]
    assert torch.equal(from_disk.latents, in_memory.latents)
    assert (from_disk.original_size_hw, from_disk.crop_top_left) == (
        in_memory.original_size_hw,
        in_memory.crop_top_left,
    )


def test_vanished_picture_is_named(folders):
    dataset = build(folders)
    (folders / "2_cat" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png \(the file is not there any more\)"):
        dataset[draw(0)]


def test_damaged_picture_is_named(folders):
    dataset = build(folders)
    path = folders / "2_cat" / "0.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot be read: .*0\.png"):
        dataset[draw(0)]


def test_everything_but_dataset_py_needs_no_torch():
    names = "config folder metadata_file scan captions buckets images cache cache_check file_marks views sheet"
    modules = names.split()
    imports = "; ".join(f"import library.dataset.{module}" for module in modules)
    code = f"{imports}; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_latents_of_jpegs_read_fast_are_told_from_others(folders):
    """Only of those that are reduced: cached latents of all others fit with and without --fast_jpeg."""
    blue = Image.new("RGB", (300, 260), "blue")
    blue.save(folders / "2_cat" / "0.jpg")
    blue.resize((66, 64)).save(folders / "2_cat" / "1.JPG")
    plain, fast = build(folders), build(folders, fast_jpeg=True)
    names = [record.path.name for record in plain.scanned.records]
    differ = [
        name
        for index, name in enumerate(names)
        if plain.wanted_latents(index).resized != fast.wanted_latents(index).resized
    ]
    assert differ == ["0.jpg"]
    index = names.index("0.jpg")
    assert (plain.image(index) - fast.image(index)).abs().max() < 0.05
