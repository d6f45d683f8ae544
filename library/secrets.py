"""Keys and tokens that a run was given, and texts without them: for messages, logs and what trackers keep."""

import re

MIN_LENGTH = 8  # shorter ones are no keys, and would be found in every other text
SECRET_NAME = re.compile(r"(api_?key|token|secret|password)$", re.IGNORECASE)
SECRET_LINE = re.compile(
    r"""^\s*["']?\w*(?:api_?key|token|secret|password)["']?\s*[=:]\s*(.+?)[,\s]*$""", re.IGNORECASE | re.MULTILINE
)
HIDDEN = "(hidden)"

_secrets: set[str] = set()


def hide(value: object) -> None:
    """Keep a value out of all texts from now on."""
    if isinstance(value, str) and len(value) >= MIN_LENGTH:
        _secrets.add(value)


def hide_in(table: dict) -> None:
    """Hide the values of a table's keys that are called like secrets, tables inside it included."""
    for name, value in table.items():
        if isinstance(value, dict):
            hide_in(value)
        elif SECRET_NAME.search(name):
            hide(value)


def hide_in_text(text: str) -> None:
    """Hide what stands behind the names of secrets in a configuration that cannot be parsed."""
    for match in SECRET_LINE.finditer(text):
        hide(match[1].strip("\"'"))


def redacted(text: str) -> str:
    """The text without secrets."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
