"""Weights in captions and prompts, written as in the WebUI: (word), [word], (word:1.3). Needs no torch.

Round brackets make what is inside 1.1 times as strong, square ones weaken it as much, and nested ones multiply. After
a backslash a bracket is a letter; so is one that closes nothing, while one that is never closed reaches to the end.
`[word:0.5]` is no schedule: it weakens "word:0.5".
"""

import re

BRACKET_FACTOR = 1.1

_PART = re.compile(
    r"\\(?P<escaped>[\\()\[\]]?)"  # a backslash before anything else is dropped
    r"|(?P<opening>[(\[])"
    r"|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)"
    r"|(?P<closing>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_CLOSING = {"(": ")", "[": "]"}
_FACTORS = {")": BRACKET_FACTOR, "]": 1 / BRACKET_FACTOR}


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The text in pieces, each with its weight; neighbours of one weight are one piece."""
    words: list[str] = []
    weights: list[float] = []
    open_since: dict[str, list[int]] = {")": [], "]": []}  # where brackets not yet closed began, by what closes them

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for part in _PART.finditer(text):
        kind = part.lastgroup
        closing = ")" if kind == "weight" else part[kind]
        if kind == "opening":
            open_since[_CLOSING[part[kind]]].append(len(words))
        elif kind in ("weight", "closing") and open_since[closing]:
            multiply(open_since[closing].pop(), float(part["weight"]) if kind == "weight" else _FACTORS[closing])
        else:
            words.append(part[kind] if kind == "escaped" else part[0])
            weights.append(1.0)
    for closing, starts in open_since.items():
        for start in starts:
            multiply(start, _FACTORS[closing])
    return joined(words, weights)


def joined(words: list[str], weights: list[float]) -> list[tuple[str, float]]:
    """Neighbours of one weight together, so that words are not cut where nothing changes."""
    pieces: list[tuple[str, float]] = []
    for word, weight in zip(words, weights, strict=True):
        if pieces and pieces[-1][1] == weight:
            pieces[-1] = pieces[-1][0] + word, weight
        else:
            pieces.append((word, weight))
    return [(word, weight) for word, weight in pieces if word]
