"""Adapters added to the weights of a model, one tensor after the other."""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.base_model import BaseModel, Place
from library.adapters.block_weights import BlockWeights
from library.adapters.file import AdapterFile, AdapterLayer
from library.adapters.streaming import write_streamed
from library.errors import UserError, quoted_list
from library.families.checkpoint_files import Target, dtype_of, loaded, shape_of
from library.families.ldm_open_clip import part_of
from library.files import put_folder_in_place, temporary_folder

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Weighted:
    """An adapter file and how much of it is wanted, in all and by block."""

    file: AdapterFile
    ratio: float = 1.0
    blocks: BlockWeights | None = None

    def ratio_of(self, name: str) -> float:
        return self.ratio * (self.blocks.of(name) if self.blocks else 1.0)


@dataclass(frozen=True)
class Change:
    """What one layer of an adapter does to one parameter of the model."""

    layer: AdapterLayer
    ratio: float
    place: Place
    is_bias: bool

    def add_to(self, tensor: Tensor) -> None:
        """Add it to the tensor of the model's file, in place."""
        view = part_of(tensor, self.place.part)
        change = self.layer.bias_delta() if self.is_bias else self.layer.delta(view.reshape(self.place.shape))
        view.add_(change.to(tensor.device, tensor.dtype).reshape(view.shape), alpha=self.ratio)


Plan = dict[Path, dict[str, list[Change]]]  # by file and key of the model


def plan_merge(model: BaseModel, adapters: Iterable[Weighted]) -> Plan:
    """Which tensors change, and how; UserError where a file has no layer of the model, a warning for single ones."""
    plan: Plan = {}

    def add(change: Change) -> None:
        plan.setdefault(change.place.file, {}).setdefault(change.place.key, []).append(change)

    for adapter in adapters:
        unplaced = list(adapter.file.leftovers)
        for name, layer in adapter.file.layers.items():
            places, ratio = model.find(name), adapter.ratio_of(name)
            if places is None:
                unplaced.append(name)
                continue
            add(Change(layer, ratio, places.weight, is_bias=False))
            if layer.has_bias and places.bias:
                add(Change(layer, ratio, places.bias, is_bias=True))
            elif layer.has_bias:
                unplaced.append(f"{name} (its bias)")
        if not set(adapter.file.layers) - set(unplaced):
            raise UserError(
                f"--models: {adapter.file.path} was made for another kind of model than {model.path}: none of its "
                f"layers is there, e.g. {unplaced[-1]}"
            )
        if unplaced:
            where = f"{model.path} has no place for it" if len(unplaced) == 1 else f"{model.path} has no place for them"
            logger.warning("%s: not merged, as %s: %s", adapter.file.path, where, quoted_list(unplaced, 3))
    return plan


def write_merged(
    model: BaseModel,
    plan: Plan,
    target: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    progress: Callable[[], object],
) -> None:
    """The model with all changes, as one file or as a folder where it is one; `progress` is called for each tensor."""
    if not model.is_folder:
        _write_file(model, model.path, plan, target, dtype, metadata, progress)
        return
    with temporary_folder(target) as folder:
        changed = {file.relative_to(model.path) for file in model.files}
        for path in sorted(model.path.rglob("*")):
            inside = path.relative_to(model.path)
            if path.is_file() and inside not in changed:
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / inside)
        for file in model.files:
            place = folder / file.relative_to(model.path)
            _write_file(model, file, plan, place, dtype, {"format": "pt"}, progress)
        put_folder_in_place(folder, target)


def _write_file(
    model: BaseModel,
    file: Path,
    plan: Plan,
    target: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    progress: Callable[[], object],
) -> None:
    weights, changes = model.files[file], plan.get(file, {})

    def format_of(name: str) -> torch.dtype:
        stored = dtype_of(weights, name)
        return dtype if dtype and stored.is_floating_point else stored

    @torch.no_grad()
    def tensor_of(name: str) -> Tensor:
        progress()
        if name not in changes:
            return loaded(weights, name, Target(format_of(name)))
        tensor = loaded(weights, name, Target(torch.float32)).clone()
        for change in changes[name]:
            change.add_to(tensor)
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite after merging: one of the files holds numbers that are none")
        return tensor

    planned = {name: (format_of(name), shape_of(weights, name)) for name in weights}
    write_streamed(target, planned, tensor_of, metadata)
