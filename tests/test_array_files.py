"""Files that are read again give what numpy reads, and are never taken for what they were."""

import os
import zipfile

import numpy as np
import pytest

from library.dataset import array_files
from library.dataset.array_files import KnownArrays

NAMES = ("a", "b", "c")


def write(path, seed=0, save=np.savez, **arrays) -> None:
    rng = np.random.default_rng(seed)
    save(path, a=rng.random((4, 8, 6), np.float32), b=np.array([seed, 2]), other=np.zeros(100), **arrays)


def same(found: dict, path) -> bool:
    with np.load(path) as file:
        right = {name: file[name] for name in NAMES if name in file}
    return found.keys() == right.keys() and all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in right.items()
    )


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"c": np.arange(600, dtype=np.float16).reshape(2, 300)},
        {"c": np.arange(200.0)},
        {"c": np.zeros((0, 3))},
        {"c": np.float32(2)},
        {"c": np.arange(600.0).reshape(20, 30).T},
        {"c": np.arange(600, dtype=">f4")},
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_reading_gives_what_numpy_reads(arrays, save, tmp_path):
    known = KnownArrays(NAMES)
    write(tmp_path / "a 中.npz", 1, save, **arrays)
    write(tmp_path / "b.npz", 2, save, **arrays)
    for _ in range(3):
        assert same(known.read(tmp_path / "a 中.npz"), tmp_path / "a 中.npz")
        assert same(known.read(str(tmp_path / "b.npz")), tmp_path / "b.npz")


def test_members_with_extra_fields_in_front_are_found(tmp_path):
    write(tmp_path / "plain.npz")
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in plain.namelist():
            info = zipfile.ZipInfo(name)
            info.extra = b"\x99\x99\x04\x00abcd"
            file.writestr(info, plain.read(name))
    known = KnownArrays(NAMES)
    for _ in range(2):
        assert same(known.read(tmp_path / "a.npz"), tmp_path / "a.npz")


def test_a_known_file_is_read_without_numpys_search(tmp_path, monkeypatch):
    write(tmp_path / "a.npz")
    known = KnownArrays(NAMES)
    first = known.read(tmp_path / "a.npz")
    monkeypatch.setattr(array_files, "open_arrays", None)
    again = known.read(tmp_path / "a.npz")
    assert np.array_equal(first["a"], again["a"]) and again["a"].flags.writeable and again["a"].flags.aligned


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    path, known = tmp_path / "a.npz", KnownArrays(NAMES)
    write(path, 1)
    known.read(path)
    write(tmp_path / "new.npz", 2)
    os.utime(tmp_path / "new.npz", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(tmp_path / "new.npz", path)  # as caches are written: of the same size and time, but another file
    assert same(known.read(path), path)


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    path, known = tmp_path / "a.npz", KnownArrays(NAMES)
    write(path)
    known.read(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(zipfile.BadZipFile):
        known.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        known.read(path)
