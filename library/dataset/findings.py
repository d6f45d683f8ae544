"""One thing that was found of several pictures, as a sentence says it."""

import os
from dataclasses import dataclass

from library.errors import counted, quoted_list


@dataclass(frozen=True)
class Finding:
    """What was found, and of which pictures."""

    what: str  # follows the verb
    items: list[str]  # a name each, with what is to be said of it; the worst first
    matters: bool = True  # enough to be told without being asked
    noun: str = "picture"
    verb: str = "is"
    plural_verb: str = "are"

    @property
    def sentence(self) -> str:
        """For instance "2 pictures are of no use (1_cat/a.png, 1_cat/b.png)"."""
        verb = self.verb if len(self.items) == 1 else self.plural_verb
        return f"{counted(len(self.items), self.noun)} {verb} {self.what} ({quoted_list(self.items, limit=3)})"


def named(file: str) -> str:
    """A file with its folder, which is enough to find it by."""
    folder, name = os.path.split(file)
    return f"{os.path.basename(folder)}/{name}"
