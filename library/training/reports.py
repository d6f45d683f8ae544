"""What a run says in tables: what will be trained before the first step, where the file goes at the end."""

from dataclasses import dataclass
from unicodedata import east_asian_width


@dataclass(frozen=True)
class TrainedPart:
    """One row of the table before the first step."""

    name: str
    num_modules: int
    num_parameters: int
    learning_rates: list[float]  # from the lowest; empty where nothing of it is trained


def parts_table(parts: list[TrainedPart]) -> str:
    """Part, modules, parameters and learning rate, aligned."""
    rows = [("part", "modules", "parameters", "learning rate")]
    for part in parts:
        rows.append((part.name, str(part.num_modules), f"{part.num_parameters:,}", rates_text(part.learning_rates)))
    return aligned(rows, numbers=(1, 2))


def aligned(rows: list[tuple[str, ...]], numbers: tuple[int, ...]) -> str:
    """A table whose first row is its head; the columns in `numbers` stand to the right."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], tuple("-" * min(width, 60) for width in widths), *rows[1:]]:
        fills = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [fill + row[i] if i in numbers else row[i] + fill for i, fill in enumerate(fills)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal, where Chinese, Japanese and Korean characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def rates_text(rates: list[float]) -> str:
    """The learning rate, or the lowest and the highest."""
    if not rates:
        return "not trained"
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
