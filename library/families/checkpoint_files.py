"""The weights of a checkpoint file, read as they are asked for, and models filled from them.

A model is built on the meta device and given the file's own (memory-mapped) tensors, so nothing is initialised at
random first and nothing is read that is not used. Names are mapped from diffusers to the file, so that every weight of
the model is accounted for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


class UnmappedReader(SafetensorsReader):
    """The same, with each tensor read from the file into memory of its own."""

    DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

    def __init__(self, path: Path):
        super().__init__(path)
        self._bytes = open(path, "rb")  # noqa: SIM115  as long as the reader lives
        header_size = int.from_bytes(self._bytes.read(8), "little")
        self._header = json.loads(self._bytes.read(header_size))
        self._data_start = 8 + header_size

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header[name]
        first, last = entry["data_offsets"]
        self._bytes.seek(self._data_start + first)
        data = bytearray(last - first)
        self._bytes.readinto(data)
        dtype = self.DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{name} is stored as {entry['dtype']}, no format of model weights; get another file")
        if not data:
            return torch.empty(entry["shape"], dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(entry["shape"])


def open_checkpoint(path: Path, mapped: bool = True) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file by name; pickles are loaded weights-only, so none of their code runs."""
    if path.suffix.lower() == ".safetensors":
        return SafetensorsReader(path) if mapped else UnmappedReader(path)
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


@dataclass(frozen=True)
class Target:
    """Where the weights of a model go as they are read, and in which number format."""

    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], name_in_file: Callable[[str], str], target: Target, what: str
) -> None:
    """Give a model on the meta device its weights from a file; every one must be there and fit."""
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
        filled[name] = value.reshape(empty.shape).to(target.device, target.dtype)
    if missing:
        raise UserError(f"the checkpoint has no {what}: {len(missing)} weights are missing, e.g. {missing[0]}")
    if misshapen:
        raise UserError(f"the checkpoint's {what} has weights of other sizes: {quoted_list(misshapen, 3)}")
    model.load_state_dict(filled, assign=True)
