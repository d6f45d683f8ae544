"""The outcome of a benchmark as Markdown tables and as JSON. No torch."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tools.benchmarks.contestants import Contestant
from tools.benchmarks.fidelity import Verdict
from tools.benchmarks.harness import Round
from tools.benchmarks.measures import IN_CPU, MEASURES, Column, Measure


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

    def counts(self, contestant: Contestant) -> bool:
        return not self.verdicts or self.verdicts[contestant.name].counts


def counted_rounds(rounds: list[Round]) -> list[Round]:
    """The valid ones, or where there is none all of them."""
    return [done for done in rounds if not done.void] or rounds


def values(rounds: list[Round], name: str, key: str) -> list[float]:
    found = [done.figures.get(name, {}).get(key) for done in counted_rounds(rounds)]
    return [value for value in found if value is not None]


def ratio(rounds: list[Round], first: str, second: str, key: str) -> str:
    """The ratio of medians, and the least and the greatest ratio within a round."""
    pairs = [
        (done.figures[first][key], done.figures[second][key])
        for done in counted_rounds(rounds)
        if first in done.figures and second in done.figures
    ]
    if not pairs or not all(above > 0 and below > 0 for above, below in pairs):
        return "–"
    above, below = zip(*pairs, strict=True)
    each = [a / b for a, b in pairs]
    return f"{median(above) / median(below):.2f} ({min(each):.2f}–{max(each):.2f})"


def markdown(outcome: Outcome) -> str:
    parts = ["# Benchmark", bullets(outcome.machine), bullets(outcome.setup)]
    if outcome.verdicts:
        rows = [
            [name, "yes" if verdict.counts else "**no**", verdict.why] for name, verdict in outcome.verdicts.items()
        ]
        parts += ["## Agreement of losses", table(["contestant", "counts", "why"], rows)]
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
    asked = [who for who in outcome.contestants if any(who.name in {*r.figures, *r.failures} for r in rounds)]
    parts = [f"## {measure.title}", validity(rounds) if measure.in_rounds else "Counted once."]
    if measure.is_of_dataset:
        parts.append(table(["what", "s, median", "CPU s"], rows_of_dataset(rounds)))
    else:
        mfu = ["MFU"] if name == "step" else []
        head = ["contestant", *(column.title for column in measure.columns), *mfu]
        parts.append(table(head, [row(outcome, who, measure, rounds, with_mfu=bool(mfu)) for who in asked]))
        parts += [mfu_note(outcome)] if mfu else []
    parts += [f"{who} failed: {why}" for done in rounds for who, why in done.failures.items()]
    for key in measure.judged[outcome.clock]:
        parts += ratios(outcome, measure, key, asked, rounds)
    return parts


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
    if not outcome.counts(who):
        cells[0] += " (does not count)"
        cells[1:] = [f"~~{value}~~" for value in cells[1:]]
    return cells


def rows_of_dataset(rounds: list[Round]) -> list[list[str]]:
    """A line for each thing that was timed, with its CPU time, whose name ends so."""
    names = dict.fromkeys((who, key) for done in rounds for who, figures in done.figures.items() for key in figures)
    return [
        [key, cell(rounds, who, Column(key, key)), cell(rounds, who, Column(key + IN_CPU, key))]
        for who, key in names
        if not key.endswith(IN_CPU)
    ]


def cell(rounds: list[Round], name: str, column: Column) -> str:
    found = values(rounds, name, column.key)
    return f"{median(found):.{column.digits}f}" if found else "–"


def ratios(outcome: Outcome, measure: Measure, key: str, asked: list[Contestant], rounds: list[Round]) -> list[str]:
    """A table of ours over everyone else and over our first mode; only of those that count."""
    counting = [who for who in asked if outcome.counts(who)]
    ours = [who for who in counting if who.kind == "ours"]
    others = [*ours[:1], *(who for who in counting if who.kind != "ours")]
    rows = [
        [who.name, *("1" if who is other else ratio(rounds, who.name, other.name, key) for other in others)]
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
