"""What a safetensors file says of itself, without reading its tensors."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.texts import read_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class SafetensorsHeader:
    """Names and shapes of a file's tensors, in its order, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # "F32", "F16", "BF16", ...
    offsets: dict[str, tuple[int, int]]  # where the data of each begins and ends, behind the header
    metadata: dict[str, str]
    size: int  # of the header with its length, in bytes: where the tensors begin


def read_header(path: Path, label: str) -> SafetensorsHeader:
    """The header of a whole file; a UserError, which begins with the label (a flag), where the file is none."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{label}: {path} is not a safetensors file or was cut off ({size} bytes); get it again")
        try:
            header = read_json(file.read(header_size).decode())
            metadata = {str(name): str(value) for name, value in dict(header.pop("__metadata__", None) or {}).items()}
            shapes = {name: _sizes(entry["shape"]) for name, entry in header.items()}
            dtypes = {name: str(entry.get("dtype")) for name, entry in header.items()}
            offsets = {name: _ends(entry["data_offsets"]) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{label}: {path} has a broken safetensors header; get the file again") from None
    expected = 8 + header_size + max((end for _, end in offsets.values()), default=0)
    if size < expected:
        raise UserError(
            f"{label}: {path} is cut off: its header promises {expected} bytes, it has {size}; get the file again"
        )
    return SafetensorsHeader(shapes, dtypes, offsets, metadata, 8 + header_size)


def _ends(values: list[int]) -> tuple[int, int]:
    first, last = _sizes(values)
    return first, last


def _sizes(values: list[int]) -> tuple[int, ...]:
    """A shape, or two ends of data; ValueError where it is none."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)
