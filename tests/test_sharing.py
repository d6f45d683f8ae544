"""How processes share a batch: rows, weights and random numbers are those of one process with the whole of it."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.dataset.loader import SharedBatches
from library.dataset.own_dataset import OwnDataset
from library.dataset.sampler import BucketSampler
from library.dataset.scan import ScannedDataset
from library.dataset.share import share_of
from library.options.groups import TrainNetworkOptions
from library.training.denoising import Ddpm, perturbed_noise, sample_noise
from library.training.randomness import TrainingRandomness, noise_of_pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_shares_are_even_and_their_weighted_means_are_the_mean_of_all(size, num_processes):
    values = np.random.default_rng(size).normal(size=size)
    shares = [share_of(rank, num_processes, size, seed=0) for rank in range(num_processes)]
    means = [share.weight * values[share.first : share.stop].mean() for share in shares]
    assert sum(means) / num_processes == pytest.approx(values.mean())
    counting = [row for share in shares if share.weight for row in range(share.first, share.stop)]
    assert counting == list(range(size))
    counts = [share.stop - share.first for share in shares if share.weight]
    assert max(counts) - min(counts) <= 1 and all(share.stop > share.first for share in shares)


def sampler(batch_size: int, num_processes: int = 1) -> BucketSampler:
    """Of buckets of 7, 5 and 1 pictures."""
    buckets = [0] * 7 + [1] * 5 + [2]
    return BucketSampler(buckets, [1] * 13, batch_size, 3, num_processes=num_processes)


@pytest.mark.parametrize("start", [0, 2])
def test_processes_together_draw_what_one_draws_with_the_whole_batch(start):
    alone = SharedBatches(sampler(6), 1, 0)
    shared = [SharedBatches(sampler(2, 3), 3, rank) for rank in range(3)]
    for batches in (alone, *shared):
        batches.sampler.set_epoch(2)
        batches.start = start
    assert {len(batches) for batches in (alone, *shared)} == {4}
    wanted, found = list(alone), [list(batches) for batches in shared]
    assert len(wanted) == 4 - start
    for number, whole in enumerate(wanted):
        parts = [draw for batches in found for draw in batches[number] if draw.share.weight]
        assert [replace(draw, share=None) for draw in parts] == [replace(draw, share=None) for draw in whole]
        assert {draw.share.seed for draw in parts} == {whole[0].share.seed}
    assert len({batch[0].share.seed for batch in wanted}) == len(wanted)


NOISE = {
    "plain": {},
    "offset": dict(noise_offset=0.1, noise_offset_random_strength=True),
    "pyramid": dict(noise_offset=0.1, multires_noise_iterations=4),
    "perturbed": dict(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True),
}


@pytest.mark.parametrize("given", NOISE.values(), ids=NOISE)
def test_noise_and_timesteps_are_those_of_the_rows_whatever_was_drawn_before(given):
    options = TrainNetworkOptions(**given)
    objective = Ddpm(options, False, CPU)
    latents = torch.randn(5, 4, 8, 8)

    def drawn(rank: int, num_processes: int) -> tuple[torch.Tensor, ...]:
        torch.rand(rank + num_processes)
        share = share_of(rank, num_processes, 5, seed=9)
        numbers = TrainingRandomness(CPU, rank).begin(share)
        rows = latents[share.first : share.stop]
        noise = sample_noise(rows, options, numbers)
        return noise, objective.sample_timesteps(len(rows), numbers), perturbed_noise(noise, options, numbers)

    parts = [torch.cat(part) for part in zip(*(drawn(rank, 2) for rank in range(2)), strict=True)]
    for whole, part in zip(drawn(0, 1), parts, strict=True):
        assert torch.equal(whole, part)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_that_could_not_be_read_leave_a_share_of_the_others(num_processes):
    share = share_of(0, num_processes, 8, seed=1)
    left = share.with_rows(2)
    assert (left.stop - left.first, left.weight, left.is_whole) == (2, 1.0, num_processes == 1)
    assert share.with_rows(share.stop) == share


def test_every_batch_begins_all_generators_anew_and_each_process_has_its_own():
    def drawn(rank: int, seed: int) -> tuple[float, ...]:
        TrainingRandomness(CPU, rank).begin(share_of(0, 1, 1, seed))
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({*drawn(0, 5), *drawn(1, 5), *drawn(0, 6)}) == 9


def test_the_noise_of_a_pictures_latents_depends_on_no_other_picture():
    mean = torch.zeros(3, 4, 2, 2)
    together = noise_of_pictures(1, [4, 5, 6], "upright")(mean)
    assert torch.equal(noise_of_pictures(1, [5], "upright")(mean[:1])[0], together[1])
    assert not torch.equal(noise_of_pictures(1, [5], "mirrored")(mean[:1])[0], together[1])


class Items:
    """A dataset class of the user's own, of three batches."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        return {"captions": ["a cat"] * 2, "images": torch.zeros(2, 3, 64, 64)}


def test_batches_of_an_own_class_stay_whole_and_the_last_is_shared_evenly():
    dataset = OwnDataset(ScannedDataset([], [], [], own=Items()), SimpleNamespace(dataset_class="own.Items"), 0, 1)
    first, second = (
        [dataset[draws[0]].share for draws in SharedBatches(dataset.sampler(num_processes=2), 2, rank)]
        for rank in (0, 1)
    )
    weights = {(one.weight, other.weight) for one, other in zip(first, second, strict=True)}
    assert weights == {(1.0, 1.0), (2.0, 0.0)}  # there is no fourth item
    assert all(share.is_whole for share in first + second)
    assert all((one.seed != other.seed) == bool(other.weight) for one, other in zip(first, second, strict=True))
