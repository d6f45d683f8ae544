"""The step arithmetic: batches, accumulation, processes, epochs, and how often files are written."""

import pytest

from library.options.groups import LoopOptions, SavingOptions
from library.training.plan import num_processes, save_every_n_epochs, step_plan


def plan(batches, processes=1, **options):
    return step_plan(LoopOptions(**options), num_items=100, batches_per_epoch=batches, processes=processes)


@pytest.mark.parametrize(
    ("batches", "accumulation", "steps"),
    [
        (8, 1, 8),
        (8, 2, 4),
        (9, 2, 5),  # the last batch of an epoch makes a step of its own
        (1, 4, 1),
    ],
)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_steps_of_an_epoch_are_of_batches_that_processes_share(batches, accumulation, processes, steps):
    found = plan(batches, processes, max_train_epochs=3, gradient_accumulation_steps=accumulation)
    assert (found.steps_per_epoch, found.num_epochs, found.max_train_steps) == (steps, 3, 3 * steps)


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_epochs_follow_from_steps(steps, epochs):
    found = plan(8, max_train_steps=steps)
    assert (found.num_epochs, found.max_train_steps) == (epochs, steps)


def test_epochs_go_before_steps():
    assert plan(8, max_train_steps=5, max_train_epochs=2).max_train_steps == 16


def test_nothing_given_is_1600_steps():
    assert plan(100).max_train_steps == 1600


@pytest.mark.parametrize("batches", [1, 7, 8, 30])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_planned_epochs_hold_the_planned_steps_and_none_is_idle(batches, accumulation):
    found = plan(batches, max_train_steps=23, gradient_accumulation_steps=accumulation)
    assert (found.num_epochs - 1) * found.steps_per_epoch < 23 <= found.num_epochs * found.steps_per_epoch
    assert found.steps_per_epoch * accumulation >= batches


def test_sentence_spells_the_arithmetic_out():
    text = "100 pictures with repeats / batch size 4 = 25 batches an epoch; 2 epochs, 50 steps in all"
    assert plan(25, max_train_epochs=2).sentence([4]) == text
    text = plan(13, 2, max_train_epochs=2, gradient_accumulation_steps=3).sentence([4])
    shared = "batch size 4 x 2 processes = 13 batches / accumulation 3 = 5 steps an epoch; 2 epochs, 10 steps in all"
    assert shared in text


def test_number_of_processes_is_that_of_the_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert num_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert num_processes() == 3


@pytest.mark.parametrize(("ratio", "epochs", "every"), [(3, 10, 3), (5, 10, 2), (10, 10, 1), (20, 10, 1), (1, 10, 10)])
def test_ratio_of_epochs_becomes_a_distance_of_at_least_one(ratio, epochs, every):
    assert save_every_n_epochs(SavingOptions(save_n_epoch_ratio=ratio), epochs) == every


def test_without_a_ratio_the_distance_is_the_one_given():
    assert save_every_n_epochs(SavingOptions(save_every_n_epochs=4), 10) == 4
    assert save_every_n_epochs(SavingOptions(), 10) is None
