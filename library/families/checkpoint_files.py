"""The weights of a checkpoint file, read as they are asked for, and models filled from them.

A model is built on the meta device and given the file's own (memory-mapped) tensors, so nothing is initialised at
random first and nothing is read that is not used. Names are mapped from diffusers to the file, so that every weight of
the model is accounted for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from library.errors import UserError, quoted_list


class SafetensorsReader(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read from the memory-mapped file when asked for."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); get it again") from error
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


def open_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file by name; pickles are loaded weights-only, so none of their code runs."""
    if path.suffix.lower() == ".safetensors":
        return SafetensorsReader(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded safely: it is damaged or holds more than weights; "
            "get the .safetensors version of this model"
        ) from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"the checkpoint is not complete: it has no {name}")
    return weights.shape(name) if isinstance(weights, SafetensorsReader) else tuple(weights[name].shape)


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], name_in_file: Callable[[str], str], dtype: torch.dtype, what: str
) -> None:
    """Give a model on the meta device its weights from a file, in `dtype`; every one must be there and fit."""
    filled, missing, misshapen = {}, [], []
    for name, empty in model.state_dict().items():
        source = name_in_file(name)
        if source not in weights:
            missing.append(source)
            continue
        value = weights[source]
        if value.numel() != empty.numel():
            misshapen.append(f"{source} {tuple(value.shape)} instead of {tuple(empty.shape)}")
            continue
        filled[name] = value.reshape(empty.shape).to(dtype)
    if missing:
        raise UserError(f"the checkpoint has no {what}: {len(missing)} weights are missing, e.g. {missing[0]}")
    if misshapen:
        raise UserError(f"the checkpoint's {what} has weights of other sizes: {quoted_list(misshapen, 3)}")
    model.load_state_dict(filled, assign=True)
