"""What a run says in tables: what will be trained before the first step, where the file goes at the end."""

from dataclasses import dataclass


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
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def rates_text(rates: list[float]) -> str:
    """The learning rate, or the lowest and the highest."""
    if not rates:
        return "not trained"
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
