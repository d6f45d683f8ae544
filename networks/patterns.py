"""Ranks, alphas and learning rates for layers whose names match patterns, as `--network_args`. Needs no torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A regular expression that is looked for in a layer's name in the file, and what such layers have."""

    expression: re.Pattern[str]
    value: float


def patterns_of(number: Callable[[str], float], described: str) -> Callable[[str], list[Pattern]]:
    """A reader of `expression=number,expression=number`."""

    def read(text: str) -> list[Pattern]:
        found = []
        try:
            for item in text.split(","):
                expression, equals, value = item.strip().rpartition("=")
                if not (equals and expression) or number(value) < 0:
                    raise ValueError
                found.append(Pattern(re.compile(expression), number(value)))
        except (ValueError, re.error) as error:
            raise ValueError(f"expression={described}, several separated by commas") from error
        return found

    return read


def matching(patterns: Sequence[Pattern] | None, name: str) -> Pattern | None:
    """The first pattern that is found in a layer's name."""
    return next((pattern for pattern in patterns or () if pattern.expression.search(name)), None)


def without_layers(patterns: Sequence[Pattern], names: Sequence[str]) -> list[str]:
    """The expressions that no layer's name matches."""
    return [p.expression.pattern for p in patterns if not any(p.expression.search(name) for name in names)]


RANK_ARGUMENTS = {
    "network_reg_dims": patterns_of(int, "rank"),
    "network_reg_alphas": patterns_of(float, "alpha"),
}
ARGUMENTS = RANK_ARGUMENTS | {"network_reg_lrs": patterns_of(float, "learning rate")}
