"""Importing the large libraries in a fraction of their usual time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Diffusers and transformers import these wherever they are installed, for things that nobody asks of them here.
NOT_FOR_THEM = ("bitsandbytes", "peft", "scipy")


@contextmanager
def quick_imports() -> Iterator[None]:
    """A block of imports during which those packages seem not to be installed, and no garbage is looked for.

    Most of what is imported lives to the end, so afterwards the collector leaves it alone too. What imports one of the
    packages later, such as an optimizer, gets it. Where all was imported before, models of an earlier run would be left
    alone for good, so the collector keeps its work.
    """
    num_modules = len(sys.modules)
    hidden = [name for name in NOT_FOR_THEM if name not in sys.modules]
    collects = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if len(sys.modules) > num_modules:
            gc.freeze()
        if collects:
            gc.enable()
