"""Curves as SVG inside a page. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 26
COLOURS = ("var(--accent)", "var(--second)", "var(--third)", "var(--dim)")
NUM_TICKS = 5

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve: its points, and whether it is drawn as a thin one behind the others."""

    name: str
    points: Points
    is_faint: bool = False


def smoothed(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """The points as an average that forgets: over about this share of them, corrected for its beginning."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight))
    return found


def chart(title: str, lines: Sequence[Line], x_name: str = "step") -> str:
    """A chart with its legend, as HTML; nothing where there are no points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    ticks = nice_ticks(*_range_of_values(lines))
    low_y, high_y = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        up = min(1.04, max(-0.04, (y - low_y) / (high_y - low_y)))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        y = place(low_x, tick)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(low_x, high_x):
        if low_x <= tick <= high_x:
            x = place(tick, low_y)[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:g}</text>')
    keys, number = [f"<b>{escape(title)}</b>"], 0
    for line in lines:
        colour = COLOURS[number % len(COLOURS)]
        number += not line.is_faint
        parts.append(_drawn(line, [place(x, y) for x, y in line.points], colour))
        if len(lines) > 1 and not line.is_faint:
            keys.append(f'<span><i class=key style="background:{colour}"></i>{escape(line.name)}</span>')
    legend = "".join(f"<span>{key}</span>" for key in keys)
    return f"<div class=chart><p>{legend}<span class=unit>by {escape(x_name)}</span></p>{''.join(parts)}</svg></div>"


def _drawn(line: Line, places: list[tuple[float, float]], colour: str) -> str:
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = 'stroke-width="1" opacity=".3"' if line.is_faint else 'stroke-width="2"'
    return f'<polyline points="{path}" fill="none" stroke="{colour}" {style} stroke-linejoin="round"/>'


def _range_of_values(lines: Sequence[Line]) -> tuple[float, float]:
    """From the lowest to the highest value, without the most extreme ones of long curves."""
    values = sorted(y for line in lines for _, y in line.points)
    cut = len(values) // 200
    low, high = values[cut], values[-1 - cut]
    return (low, high) if high > low else (min(0.0, low), max(high, low + 1e-9, 0.0) or 1.0)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover a range in about five steps."""
    raw = (high - low) / NUM_TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]
