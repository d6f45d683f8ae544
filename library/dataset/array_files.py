"""Arrays in .npz files: written whole or not at all, read as numpy reads them, and read faster once they are known."""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_STORED

import numpy as np

from library.errors import CannotWrite, UserError
from library.files import write_bytes_whole

DAMAGED = Exception  # numpy, zipfile and zlib raise many kinds on damaged files
SMALL = 64  # bytes of an array that is remembered itself
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip file: signature, lengths of its name and extra field


def write_arrays(path: Path, arrays: dict[str, np.ndarray], what: str, in_memory: str) -> None:
    """Write an .npz whole; a UserError says `what` it is of, and the flag that keeps it in memory instead."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    try:
        write_bytes_whole(path, file.getbuffer(), durable=False)
    except CannotWrite as error:
        raise UserError(
            f"{what} cannot be written to {path}: {error.strerror}; --{in_memory} alone keeps them in memory"
        ) from error


@contextmanager
def open_arrays(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """An .npz file, no pickle in it read; raises one of DAMAGED where it is none."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a file")  # to read a pipe would be to wait
    with open(path, "rb") as bytes_of_file, np.lib.npyio.NpzFile(bytes_of_file, allow_pickle=False) as file:
        yield file


class Arrays(dict[str, np.ndarray]):
    """Arrays of one file by name."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"it holds no {name}")


def read_arrays(path: str | Path, names: Sequence[str]) -> Arrays:
    """Those of some arrays that are there; raises one of DAMAGED where the file is."""
    with open_arrays(path) as file:
        return Arrays((name, file[name]) for name in names if name in file)


class Place(NamedTuple):
    """Where the numbers of an array lie in its file."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Known(NamedTuple):
    """What is remembered of a file while its size, time and inode stay what they were."""

    mark: tuple[int, int, int]
    places: dict[str, Place]  # one for all files that are laid out alike
    small: dict[str, np.ndarray]


class KnownArrays:
    """Reads some arrays of .npz files; those of a file that was read before by their place in it.

    The first time numpy reads a file, and its checksums are compared. To find the arrays in it takes numpy longer than
    to read them.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self._files: dict[str, Known] = {}
        self._layouts: dict[tuple, dict[str, Place]] = {}

    def read(self, path: str | Path) -> Arrays:
        """Those of the arrays that are there; raises one of DAMAGED where the file is."""
        known = self._files.get(os.fspath(path))
        return (known and read_known(path, known)) or self._first(path)

    def _first(self, path: str | Path) -> Arrays:
        with open_arrays(path) as file:
            arrays = Arrays((name, file[name]) for name in self.names if name in file)
            mark, places = _mark(file.zip.fp.fileno()), {name: place_of(file, name) for name in arrays}
        if all(places.values()):
            small = {name: array for name, array in arrays.items() if array.nbytes <= SMALL}
            large = {name: place for name, place in places.items() if name not in small}
            layout = self._layouts.setdefault(tuple(large.items()), large)
            self._files[os.fspath(path)] = Known(mark, layout, small)
        return arrays


def read_known(path: str | Path, known: Known) -> Arrays | None:
    """The arrays of a file that was read before; None where it is another now."""
    with open(path, "rb", buffering=0) as file:
        if _mark(file.fileno()) != known.mark:
            return None
        arrays = Arrays(known.small)
        for name, (offset, dtype, shape) in known.places.items():
            arrays[name] = array = np.empty(shape, dtype)
            file.seek(offset)
            if file.readinto(array) != array.nbytes:
                return None
    return arrays


def place_of(file: np.lib.npyio.NpzFile, name: str) -> Place | None:
    """Where an array lies in its file; None where it does not lie there as it is in memory."""
    info = file.zip.getinfo(f"{name}.npy")
    if info.compress_type != ZIP_STORED:
        return None
    with file.zip.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != (1, 0):
            return None
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header_size = member.tell()
    if (is_fortran and len(shape) > 1) or dtype.hasobject or not dtype.isnative:
        return None
    file.zip.fp.seek(info.header_offset)
    _, name_size, extra_size = LOCAL_HEADER.unpack(file.zip.fp.read(LOCAL_HEADER.size))
    return Place(info.header_offset + LOCAL_HEADER.size + name_size + extra_size + header_size, dtype, shape)


def _mark(handle: int) -> tuple[int, int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns, status.st_ino
