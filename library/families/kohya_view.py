"""Models under kohya's module paths and class names, for networks that choose their layers by them."""

import copy
from collections.abc import Callable, Mapping

from torch import nn


def view_of(model: nn.Module, path_in_view: Callable[[str], str | None], class_names: Mapping[str, str]) -> nn.Module:
    """The model as a tree of other paths and class names; its layers are the model's own, nothing is copied.

    A module whose path has none in the view is left out, though not what is inside of it.

    What has modules inside is there as a shallow copy: parameters, buffers and hooks are those of the model, and only a
    `forward` put on it has no effect on the model. On a layer, which has none inside, it has.
    """
    view = _renamed(model, class_names)
    for path, module in model.named_modules():
        other_path = path_in_view(path) if path else None
        if other_path is None:
            continue
        *parents, name = other_path.split(".")
        parent = view
        for level in parents:
            parent = parent._modules.setdefault(level, nn.Module())
        parent._modules[name] = _renamed(module, class_names) if module._modules else module
    return view


def _renamed(module: nn.Module, class_names: Mapping[str, str]) -> nn.Module:
    """A copy of a module without those inside, of a class of the other name where it has one."""
    copied = copy.copy(module)
    copied._modules = {}
    kind = type(module)
    if kind.__name__ in class_names:
        copied.__class__ = type(class_names[kind.__name__], (kind,), {})
    return copied
