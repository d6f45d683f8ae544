"""The outcome of a benchmark as Markdown tables and as JSON. No torch."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tools.benchmarks.bench import FOUND, IN_CPU, Column, Measure
from tools.benchmarks.contestants import Contestant
from tools.benchmarks.fidelity import Verdict
from tools.benchmarks.harness import Figures, Round
from tools.benchmarks.measures import MEASURES

ABOVE_NOISE = 3  # times its noise, from where on a difference can be divided by
NOT_COMPARED = (
    "**Losses were not compared** (`--fidelity_steps 0`): nobody knows whether these contestants train the same, so no "
    "figure of training below counts, and there are no ratios of them."
)


@dataclass
class Outcome:
    """Everything that was found."""

    machine: dict[str, str]
    setup: dict[str, Any]
    clock: str
    contestants: list[Contestant]
    verdicts: dict[str, Verdict]  # empty where losses were not compared
    rounds: dict[str, list[Round]]  # by measure
    step_flops: int
    peak_flops: float  # a second
    peak_is_of: str

    def counts(self, contestant: Contestant, measure: Measure) -> bool:
        """Whether a contestant's losses agree, where it trains."""
        verdict = self.verdicts.get(contestant.name)
        return bool(measure.parts or (verdict and verdict.counts))


def counted_rounds(rounds: list[Round]) -> list[Round]:
    """The valid ones, or where there is none all of them."""
    return [done for done in rounds if not done.void] or rounds


def values(rounds: list[Round], name: str, key: str) -> list[float]:
    found = [done.figures.get(name, {}).get(key) for done in counted_rounds(rounds)]
    return [value for value in found if value is not None]


def ratio(rounds: list[Round], first: str, second: str, key: str, noise: str = "") -> str:
    """The ratio of medians, and the least and the greatest ratio within a round.

    Of differences that have a `noise`, the second must be well above its own, and the first is taken as no less.
    """
    both = figures_of_both(rounds, first, second, key)
    if noise and any(below[key] <= ABOVE_NOISE * below[noise] for _, below in both):
        return "–"
    above = [max(figures[key], figures[noise]) if noise else figures[key] for figures, _ in both]
    below = [figures[key] for _, figures in both]
    if not both or min(*above, *below) <= 0:
        return "–"
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{short(median(above) / median(below))} ({short(min(each))}–{short(max(each))})"


def short(value: float) -> str:
    """A ratio, with a third digit where it is small."""
    return f"{value:.{2 if value >= 0.1 else 3}f}"


def figures_of_both(rounds: list[Round], first: str, second: str, key: str) -> list[tuple[Figures, Figures]]:
    """What two contestants reached in each round that counts and in which both have this figure."""
    both = [(done.figures.get(first, {}), done.figures.get(second, {})) for done in counted_rounds(rounds)]
    return [(above, below) for above, below in both if key in above and key in below]


def markdown(outcome: Outcome) -> str:
    parts = ["# Benchmark", bullets(outcome.machine), bullets(outcome.setup), "## Agreement of losses"]
    rows = [[name, "yes" if verdict.counts else "**no**", verdict.why] for name, verdict in outcome.verdicts.items()]
    parts.append(table(["contestant", "counts", "why"], rows) if rows else NOT_COMPARED)
    for name, rounds in outcome.rounds.items():
        parts += section(outcome, name, MEASURES[name], rounds)
    return "\n\n".join(parts) + "\n"


def bullets(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def section(outcome: Outcome, name: str, measure: Measure, rounds: list[Round]) -> list[str]:
    """What one measure found: which rounds count, the figures, who failed, and ratios."""
    asked = measure.asked(outcome.contestants)
    asked = [who for who in asked if any(who.name in {*r.figures, *r.failures} for r in rounds)]
    parts = [f"## {measure.title}", validity(rounds) if measure.in_rounds else "Counted once."]
    parts += [measure.note] if measure.note else []
    is_same = found_the_same(rounds)
    if measure.columns:
        mfu = ["MFU"] if name == "step" else []
        head = ["contestant", *(column.title for column in measure.columns), *mfu]
        parts.append(table(head, [row(outcome, who, measure, rounds, with_mfu=bool(mfu)) for who in asked]))
        parts += [mfu_note(outcome)] if mfu else []
    else:
        parts.append(table_of_figures(outcome.clock, asked, rounds, with_ratios=is_same))
    parts += [f"{who} failed: {why}" for done in rounds for who, why in done.failures.items()]
    if not is_same:
        return [*parts, "**Does not count**: what was found is not the same, so there are no ratios."]
    for key in measure.judged.get(outcome.clock, ()):
        parts += ratios(outcome, measure, key, asked, rounds)
    return parts


def found_the_same(rounds: list[Round]) -> bool:
    """Whether all found the same, where that is known."""
    return len({figures[FOUND] for done in rounds for figures in done.figures.values() if FOUND in figures}) <= 1


def validity(rounds: list[Round]) -> str:
    """Which rounds count."""
    void = [f"round {number}: {done.void}" for number, done in enumerate(rounds, start=1) if done.void]
    num_valid = len(rounds) - len(void)
    if not void:
        return f"All rounds are valid: {num_valid}."
    if num_valid:
        return f"{num_valid} of {len(rounds)} rounds are valid, and only those count. Void: {'; '.join(void)}."
    return f"**VOID**: no round is valid, the figures are of all of them. {'; '.join(void)}."


def mfu_note(outcome: Outcome) -> str:
    return (
        f"MFU: {outcome.step_flops / 1e12:.4g} TFLOP a step (forward and backward, nothing computed twice) over "
        f"{outcome.peak_flops / 1e12:.4g} TFLOP/s ({outcome.peak_is_of}), in {outcome.clock} seconds."
    )


def row(outcome: Outcome, who: Contestant, measure: Measure, rounds: list[Round], with_mfu: bool) -> list[str]:
    cells = [who.name, *(cell(rounds, who.name, column) for column in measure.columns)]
    if with_mfu:
        seconds = values(rounds, who.name, "step_cpu_s" if outcome.clock == "cpu" else "step_s")
        cells.append(f"{outcome.step_flops / median(seconds) / outcome.peak_flops:.1%}" if seconds else "–")
    if not outcome.counts(who, measure):
        cells[0] += " (does not count)" if outcome.verdicts else " (not compared)"
        cells[1:] = [f"~~{value}~~" for value in cells[1:]] if outcome.verdicts else cells[1:]
    return cells


def table_of_figures(clock: str, asked: list[Contestant], rounds: list[Round], with_ratios: bool) -> str:
    """A line for each thing that was timed, with the CPU time of each contestant, and of the first over the others."""
    units = [(who, unit) for who in asked for unit in ("", IN_CPU)]
    head = ["what", *(f"{who.name}, {'CPU s' if unit else 's'}" for who, unit in units)]
    others = asked[1:] if with_ratios else []
    head += [f"{asked[0].name} over {other.name}" for other in others]
    keys = dict.fromkeys(key for done in rounds for figures in done.figures.values() for key in figures)
    judged = IN_CPU if clock == "cpu" else ""
    rows = [
        [key, *(cell(rounds, who.name, Column(key + unit, key)) for who, unit in units)]
        + [ratio(rounds, asked[0].name, other.name, key + judged) for other in others]
        for key in keys
        if not key.endswith((IN_CPU, FOUND))
    ]
    return table(head, rows)


def cell(rounds: list[Round], name: str, column: Column) -> str:
    found = values(rounds, name, column.key)
    return f"{median(found):.{column.digits}f}" if found else "–"


def ratios(outcome: Outcome, measure: Measure, key: str, asked: list[Contestant], rounds: list[Round]) -> list[str]:
    """A table of ours over everyone else and over our first mode; only of those that count."""
    counting = [who for who in asked if outcome.counts(who, measure)]
    ours = [who for who in counting if who.kind == "ours"]
    others = [*ours[:1], *(who for who in counting if who.kind != "ours")]
    noise = measure.noise_of.get(key, "")
    rows = [
        [who.name, *("1" if who is other else ratio(rounds, who.name, other.name, key, noise) for other in others)]
        for who in ours
    ]
    if not rows or all(value in ("1", "–") for line in rows for value in line[1:]):
        return []
    title = next(column.title for column in measure.columns if column.key == key)
    heading = f"Ratio of medians (least–greatest of a round), {key} ({title}):"
    return [heading, table(["over", *(other.name for other in others)], rows)]


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All raw figures; what is no number is null."""
    facts = asdict(outcome)
    facts["contestants"] = [
        {"name": who.name, "python": who.python, "script": str(who.script), "flags": list(who.flags)}
        for who in outcome.contestants
    ]
    return finite(facts)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
