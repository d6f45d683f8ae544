"""The weights of a checkpoint file, read as they are asked for."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.errors import UserError

BLOCK_BYTES = 1 << 20  # of a file, read and converted at once; stays in the processor's cache


@dataclass(frozen=True)
class Target:
    """Where the weights of a model go as they are read, and in which number format."""

    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable


class SafetensorsReader(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for, from the memory-mapped file where that is wanted."""

    DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

    def __init__(self, path: Path, mapped: bool = True):
        try:
            file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); get it again") from error
        self.path = os.path.abspath(path)
        self._mapped = file if mapped else None
        self._bytes = open(path, "rb", buffering=0)  # noqa: SIM115  as long as the reader lives
        header_size = int.from_bytes(self._bytes.read(8), "little")
        self._header = json.loads(self._bytes.read(header_size))
        self._header.pop("__metadata__", None)
        self._data_start = 8 + header_size
        self._room = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        return self._mapped.get_tensor(name) if self._mapped else self._in_own_memory(name)

    def __iter__(self):
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def marks(self) -> list[int]:
        """Size, times, inode and device of the file that is open: another file, or a changed one, has others."""
        status = os.fstat(self._bytes.fileno())
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def loaded(self, name: str, target: Target) -> Tensor:
        """A tensor as the target wants it.

        One that is so in the file may be mapped. Others are read in blocks, since mapped pages of what is converted
        would count as memory of this process beside it.
        """
        if target.device.type == "meta":
            return torch.empty(self.shape(name), dtype=target.dtype, device="meta")
        dtype, (first, last) = self.dtype(name), self._header[name]["data_offsets"]
        if target.device.type == "cpu" and dtype == target.dtype:
            return self[name]
        value = torch.empty(self.shape(name), dtype=target.dtype, device=target.device)
        for start in range(first, last, BLOCK_BYTES):
            block = self._room[: min(BLOCK_BYTES, last - start)]
            self._read_into(block, start)
            begin = (start - first) // dtype.itemsize
            numbers = block.view(dtype)
            if (dtype, target.dtype) == (torch.float16, torch.bfloat16):
                numbers = numbers.float()  # the same numbers in a quarter of the time
            value.view(-1)[begin : begin + len(numbers)] = numbers
        return value

    def _in_own_memory(self, name: str) -> Tensor:
        first, last = self._header[name]["data_offsets"]
        data = torch.empty(last - first, dtype=torch.uint8)
        self._read_into(data, first)
        return data.view(self.dtype(name)).view(self.shape(name))

    def _read_into(self, room: Tensor, start: int) -> None:
        """Fill a tensor of bytes with those from `start` on, as headers count them."""
        self._bytes.seek(self._data_start + start)
        rest = memoryview(room.numpy())
        while rest and (count := self._bytes.readinto(rest)):
            rest = rest[count:]
        if rest:
            raise OSError("the checkpoint file has become shorter")

    def dtype(self, name: str) -> torch.dtype:
        stored = self._header[name]["dtype"]
        if stored not in self.DTYPES:
            raise UserError(f"{name} is stored as {stored}, no format of model weights; get another file")
        return self.DTYPES[stored]


def open_checkpoint(path: Path, mapped: bool = True) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint file by name; pickles are loaded weights-only, so none of their code runs."""
    if path.suffix.lower() == ".safetensors":
        return SafetensorsReader(path, mapped)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded safely: it is damaged or holds more than weights; "
            "get the .safetensors version of this model"
        ) from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def file_of(weights: Mapping[str, Tensor]) -> SafetensorsReader | None:
    """The file that all weights come from, where it is one that can be known again."""
    return weights if isinstance(weights, SafetensorsReader) else getattr(weights, "file", None)


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, from the header where there is one."""
    if name not in weights:
        raise UserError(f"the checkpoint is not complete: it has no {name}")
    return weights.shape(name) if hasattr(weights, "shape") else tuple(weights[name].shape)


def dtype_of(weights: Mapping[str, Tensor], name: str) -> torch.dtype:
    """The number format of a tensor, from the header where there is one."""
    return weights.dtype(name) if hasattr(weights, "dtype") else weights[name].dtype


def loaded(weights: Mapping[str, Tensor], name: str, target: Target) -> Tensor:
    if hasattr(weights, "loaded"):
        return weights.loaded(name, target)
    return weights[name].to(target.device, target.dtype)
