"""What networks of this suite say of their arguments before they are built: functions of a module, called its rules."""

import importlib
import importlib.util
from types import ModuleType


def rules_without_torch(module: str) -> ModuleType | None:
    """The rules that a network has in a file beside its own, networks/x_arguments.py; None where it has none there."""
    name = f"{module}_arguments"
    is_name = module.startswith("networks.") and module.count(".") == 1  # for others a look imports what is before
    is_there = is_name and importlib.util.find_spec(name) is not None
    return importlib.import_module(name) if is_there else None


def rules_of(module: str) -> ModuleType | None:
    """The same, or the network's own file, whose import needs torch; None for networks of other projects."""
    if not module.startswith("networks."):
        return None
    return rules_without_torch(module) or importlib.import_module(module)
