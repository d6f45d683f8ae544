"""Whether contestants train the same: a speed counts only where the losses agree. No torch."""

import math
from dataclasses import dataclass
from statistics import fmean

from tools.benchmarks.bench import Bench
from tools.benchmarks.contestants import Contestant
from tools.benchmarks.harness import RunFailed
from tools.benchmarks.inputs import REPEATS

FIRST_LOSS, MEAN_LOSS = 1e-5, 0.01  # the first by its difference, the mean by the relative one


@dataclass(frozen=True)
class Verdict:
    """Whether a contestant's speed counts, and why."""

    counts: bool
    why: str
    losses: tuple[float, ...] = ()


def losses_of(bench: Bench, contestant: Contestant, steps: int) -> list[float]:
    """The losses on one picture, with noise, timesteps and first weights that follow from the step alone."""
    return bench.run(contestant, bench.inputs.pictures(1, REPEATS), steps, fixed_numbers=True).losses


def verdicts(bench: Bench, contestants: list[Contestant], reference: Contestant, steps: int) -> dict[str, Verdict]:
    """Each contestant compared with the reference, whose losses must be there for anything to count."""
    try:
        expected = losses_of(bench, reference, steps)
    except RunFailed as error:
        return {contestant.name: Verdict(False, f"no reference: {error}") for contestant in contestants}
    found = {reference.name: Verdict(True, "the reference", tuple(expected))}
    for contestant in contestants:
        if contestant == reference:
            continue
        try:
            losses = losses_of(bench, contestant, steps)
        except RunFailed as error:
            found[contestant.name] = Verdict(False, f"failed: {error}")
        else:
            is_foreign = contestant.kind == "kohya"
            found[contestant.name] = verdict(losses, expected, contestant.is_reduced, is_foreign)
    return found


def verdict(losses: list[float], expected: list[float], is_reduced: bool, is_foreign: bool) -> Verdict:
    """In fp32 the first loss and the mean of all, in less the mean alone.

    A foreign program may draw its numbers in ways that are not replaced; then only the means can be compared.
    """
    if len(losses) != len(expected):
        return Verdict(False, f"{len(losses)} losses were seen in {len(expected)} steps", tuple(losses))
    if not all(map(math.isfinite, losses)):
        return Verdict(False, "a loss is no number", tuple(losses))
    first, mean = abs(losses[0] - expected[0]), abs(fmean(losses) / fmean(expected) - 1)
    said = f"first loss differs by {first:.1e}, the mean of {len(losses)} by {mean:.2%}"
    same_first = is_reduced or first <= FIRST_LOSS
    if mean <= MEAN_LOSS and not same_first and is_foreign:
        return Verdict(True, f"{said}: means alone were compared, the numbers drawn are others", tuple(losses))
    return Verdict(same_first and mean <= MEAN_LOSS, said, tuple(losses))
