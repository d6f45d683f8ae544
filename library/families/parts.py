"""A model without its weights, which are in a file and come when they are asked for.

A model is built on the meta device and given the file's own tensors, so nothing is initialised at random first, and
nothing is read before its time or that is not used. Names are mapped from diffusers to the file, so that every weight
of the model is accounted for, when the file is opened. Where layers are changed or rounded, that is done to one after
the other as they are read: never are two in memory as the file has them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn

from library.errors import UserError, quoted_list
from library.families.checkpoint_files import SafetensorsReader, Target, file_of, loaded, shape_of
from library.layers.frozen import is_adapted
from library.layers.swapped import stub

HOST = ("cpu", "meta")
Hold = Callable[[nn.Module], None]  # rounds the weights of a model's Linear layers and convolutions


class Part:
    """A U-Net, VAE or text encoder, frozen: its layers, and its weights while they are needed."""

    def __init__(self, layers: nn.Module, weights: Mapping[str, Tensor], name_in_file: Callable[[str], str], what: str):
        """`layers` are on the meta device; UserError unless each of their weights is in the file and fits."""
        self.layers = layers.requires_grad_(False).eval()
        self._weights = weights
        self._sources = {name: name_in_file(name) for name in layers.state_dict()}
        self._is_filled = self._is_kept = False
        self._in_main_memory: frozenset[str] = frozenset()  # names of weights
        self._changes: dict[nn.Module, list[Callable[[], None]]] = {}
        self._hold: Hold | None = None
        self._device: torch.device | None = None  # that it was last asked for on, until it is released
        self._check(what)

    @property
    def file(self) -> SafetensorsReader | None:
        """Where all its numbers come from; None where they are changed, adapted, or not read from such a file."""
        has_adapters = any(map(is_adapted, self.layers.modules()))
        return None if has_adapters or self._is_changed else file_of(self._weights)

    def source(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        """Where a weight of the layers is read, and its name there."""
        return self._weights, self._sources[name]

    def loaded(self, target: Target) -> nn.Module:
        """The model with its weights, on the device of the target."""
        if self._device != target.device:
            if self._is_filled:
                self.layers.to(target.device)
            else:
                self._fill(target)
            self._device = target.device
        return self.layers

    def read_to_main_memory(self, names: Collection[str]) -> None:
        """Have weights come no further when they are read, whatever the device."""
        self._in_main_memory = frozenset(names)

    def change(self, layer: nn.Module, change: Callable[[], None]) -> None:
        """Change a layer as soon as its weights are there."""
        if self._is_filled:
            self.keep()
            change()
        else:
            self._changes.setdefault(layer, []).append(change)

    def hold_in(self, hold: Hold) -> None:
        """Have each layer rounded as it is read, after it was changed; for a part that is not read yet."""
        self._hold = hold

    def keep(self) -> None:
        """Somebody changes the weights, so they are not what is in the file, which is let go."""
        self._is_kept = True
        self._weights = {}

    def release(self) -> None:
        """Take the model off its device until it is asked for again: to main memory; from there it is let go."""
        if self._device is None:
            return
        if self._device.type not in HOST:
            self.layers.to("cpu")
        elif not self._is_kept:
            self.layers.to("meta")
            self._is_filled = False
        self._device = None

    @property
    def _is_changed(self) -> bool:
        return self._hold is not None or bool(self._changes)

    def _check(self, what: str) -> None:
        missing, misshapen = [], []
        for name, empty in self.layers.state_dict().items():
            source = self._sources[name]
            if source not in self._weights:
                missing.append(source)
            elif prod(shape := shape_of(self._weights, source)) != empty.numel():
                misshapen.append(f"{source} {shape} instead of {tuple(empty.shape)}")
        if missing:
            raise UserError(f"the checkpoint has no {what}: {len(missing)} weights are missing, e.g. {missing[0]}")
        if misshapen:
            raise UserError(f"the checkpoint's {what} has weights of other sizes: {quoted_list(misshapen, 3)}")

    def _fill(self, target: Target) -> None:
        stays = self._is_changed or target.device.type not in HOST  # released, it goes to main memory
        for path, names in groupby(self._sources, lambda name: name.rpartition(".")[0]):
            self._fill_layer(path, list(names), target)
        restore_position_ids(self.layers, target.device)
        self._is_filled = True
        if stays:
            self.keep()

    def _fill_layer(self, path: str, names: list[str], target: Target) -> None:
        layer, state = self.layers.get_submodule(path), {}
        for name in names:
            own = name.rpartition(".")[2]
            state[own] = self._read(name, getattr(layer, own).shape, target)
        layer.load_state_dict(state, strict=False, assign=True)
        for change in self._changes.pop(layer, ()):
            change()
        if self._hold and isinstance(layer, (nn.Linear, nn.Conv2d)):
            self._hold(layer)
            if target.device.type == "meta" and not self._in_main_memory.isdisjoint(names):
                stand_for_main_memory(layer)

    def _read(self, name: str, shape: torch.Size, target: Target) -> Tensor:
        if name in self._in_main_memory:
            if target.device.type == "meta":
                return stub(shape, target.dtype)
            target = replace(target, device=torch.device("cpu"))
        return loaded(self._weights, self._sources[name], target).reshape(shape)


class LoadedPart(Part):
    """The same of a model that came with its weights; each is let go when it is where it is needed."""

    def __init__(self, model: nn.Module):
        weights = model.state_dict()
        super().__init__(model.to("meta"), weights, lambda name: name, type(model).__name__)

    def _fill(self, target: Target) -> None:
        super()._fill(target)
        self.keep()

    def _read(self, name: str, shape: torch.Size, target: Target) -> Tensor:
        value = super()._read(name, shape, target)
        del self._weights[name]
        return value


def stand_for_main_memory(layer: nn.Module) -> None:
    """Have a rounded layer's matrices on the meta device count as no memory of the device."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            parameter.data = stub(parameter.shape, parameter.dtype)


def restore_position_ids(model: nn.Module, device: torch.device) -> None:
    """`position_ids` is in no file: after a text encoder was on the meta device it has to be made again."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            count = module._buffers["position_ids"].shape[-1]
            module._buffers["position_ids"] = torch.arange(count, device=device).unsqueeze(0)
