"""A model without its weights, which are in a file and come when they are asked for.

A model is built on the meta device and given the file's own tensors, so nothing is initialised at random first, and
nothing is read before its time or that is not used. Names are mapped from diffusers to the file, so that every weight
of the model is accounted for, when the file is opened.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from library.errors import UserError, quoted_list
from library.families.checkpoint_files import SafetensorsReader, Target, file_of, loaded, shape_of
from library.layers.frozen import is_adapted
from library.layers.swapped import stub

HOST = ("cpu", "meta")


class Part:
    """A U-Net, VAE or text encoder, frozen: its layers, and its weights while they are needed."""

    def __init__(self, layers: nn.Module, weights: Mapping[str, Tensor], name_in_file: Callable[[str], str], what: str):
        """`layers` are on the meta device; UserError unless each of their weights is in the file and fits."""
        self.layers = layers.requires_grad_(False).eval()
        self._weights = weights
        self._sources = {name: name_in_file(name) for name in layers.state_dict()}
        self._is_filled = self._is_kept = False
        self._in_main_memory: frozenset[str] = frozenset()  # names of weights
        self._device: torch.device | None = None  # that it was last asked for on, until it is released
        self._check(what)

    @property
    def is_loaded(self) -> bool:
        return self._device is not None

    @property
    def file(self) -> SafetensorsReader | None:
        """Where all its numbers come from; None where they are changed, adapted, or not read from such a file."""
        has_adapters = any(map(is_adapted, self.layers.modules()))
        return None if has_adapters else file_of(self._weights)

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
        filled = {name: self._read(name, empty.shape, target) for name, empty in self.layers.state_dict().items()}
        self.layers.load_state_dict(filled, assign=True)
        restore_position_ids(self.layers, target.device)
        self._is_filled = True
        if target.device.type not in HOST:
            self.keep()  # released, it goes to main memory

    def _read(self, name: str, shape: torch.Size, target: Target) -> Tensor:
        if name in self._in_main_memory:
            if target.device.type == "meta":
                return stub(shape, target.dtype)
            target = replace(target, device=torch.device("cpu"))
        return loaded(self._weights, self._sources[name], target).reshape(shape)


class LoadedPart(Part):
    """The same of a model that came with its weights."""

    def __init__(self, model: nn.Module):
        super().__init__(model, {}, lambda name: name, "")
        self.keep()

    def _check(self, what: str) -> None:
        """There is nothing to look for."""

    def _fill(self, target: Target) -> None:
        self.layers.to(target.device, target.dtype)
        self._is_filled = True


def restore_position_ids(model: nn.Module, device: torch.device) -> None:
    """`position_ids` is in no file: after a text encoder was on the meta device it has to be made again."""
    for module in model.modules():
        if "position_ids" in module._buffers:
            count = module._buffers["position_ids"].shape[-1]
            module._buffers["position_ids"] = torch.arange(count, device=device).unsqueeze(0)
