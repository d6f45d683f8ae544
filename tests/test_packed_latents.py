"""Packs hold the same bits as .npz files, are whole after kills, kept small, and read by any process."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from library.dataset import folder_packs, packed_latents
from library.dataset.cache import CachedLatents, Origin
from library.dataset.cache_check import ABSENT, BROKEN, WantedLatents
from library.dataset.file_marks import FileMark
from library.dataset.latent_pack import ROW, PackWriter, read_entries
from library.dataset.pack_files import TRAILER, new_pack, packed_names, packs_in
from library.dataset.packed_latents import PackedLatents
from library.dataset.scan import ImageRecord
from library.errors import UserError
from library.files import MACHINE

SKETCH = np.arange(64, dtype=np.float32).reshape(4, 4, 4)


def latents(seed: int, shape: tuple[int, ...] = (4, 8, 6)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cached(seed: int) -> CachedLatents:
    """Latents with a mask, or mirrored, or both, or neither."""
    flipped, mask = latents(seed + 1), np.full((64, 48), seed, np.float32)
    return CachedLatents(
        latents(seed), (300, 400), (0.0, 1.5, 48.0, 62.5), flipped if seed % 2 else None, mask if seed % 4 > 1 else None
    )


def same(one: CachedLatents, other: CachedLatents) -> bool:
    arrays = [(getattr(one, name), getattr(other, name)) for name in ("latents", "latents_flipped", "alpha_mask")]
    return (one.original_size_wh, one.crop_ltrb) == (other.original_size_wh, other.crop_ltrb) and all(
        a is b is None or (np.array_equal(a, b) and a.dtype == b.dtype) for a, b in arrays
    )


class Folder:
    """Pictures, and latents that are made of them."""

    def __init__(self, path: Path, num_pictures: int = 6):
        path.mkdir()
        self.path = path
        self.pictures = [path / f"图 {number}.png" for number in range(num_pictures)]
        for picture in self.pictures:
            picture.write_bytes(picture.name.encode())
        self.places = [PackedLatents("sd").place(ImageRecord(str(p), (300, 400), "", True, 0)) for p in self.pictures]

    def wanted(self, number: int, **changes: object) -> WantedLatents:
        wanted = WantedLatents(
            self.pictures[number], (300, 400), bucket_wh=(48, 64), crop_ltrb=(0.0, 1.5, 48.0, 62.5),
            resized="48x64 area", mirrored=False, masked=False, mask=None,
        )  # fmt: skip
        return replace(wanted, **changes)

    def write(self, numbers: range, added: int = 0) -> None:
        """By a run of its own."""
        files = PackedLatents("sd")
        for number in numbers:
            files.write(self.places[number], cached(number + added), self.wanted(number).origin(SKETCH))
        files.finish()
        files.tidy([str(self.path)])

    def packs(self) -> list[Path]:
        return packs_in(str(self.path), "sd")

    def reasons(self) -> list[str | None]:
        found = PackedLatents("sd").examine([(place, self.wanted(n)) for n, place in enumerate(self.places)])
        return [finding.reason for finding in found]


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "图片 with space")


def test_what_is_written_is_read_to_the_bit_with_its_origin(folder):
    folder.write(range(6))
    (pack,) = folder.packs()
    for files in (PackedLatents("sd"), pickle.loads(pickle.dumps(used(folder)))):
        for number, place in enumerate(folder.places):
            for _ in range(2):
                found = files.read(place)
                assert same(found, cached(number)) and found.latents.flags.writeable and found.latents.flags.aligned
            origin = files.read_with_origin(place)[1]
            assert (origin.picture, origin.mask) == (FileMark.of(folder.pictures[number]), None)
            assert origin.resized == "48x64 area" and np.array_equal(origin.vae, SKETCH)
    assert not PackedLatents("sdxl").has(folder.places[0])
    assert packed_names([pack.name], str(folder.path), "sd") == {Path(place).name for place in folder.places}


def test_packs_of_the_working_directory_are_found(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    files = PackedLatents("sd")
    place = files.place(ImageRecord(folder.pictures[0].name, (300, 400), "", True, 0))
    files.write(place, cached(0), None)
    files.finish()
    assert same(files.read(place), cached(0))


def used(folder: Folder) -> PackedLatents:
    """As a worker process is given it, with a pack mapped."""
    files = PackedLatents("sd")
    files.read(folder.places[0])
    return files


def test_the_newest_of_several_counts_and_what_is_dead_goes(folder):
    folder.write(range(6))
    first = folder.packs()
    folder.write(range(2), added=10)
    assert len(folder.packs()) == 2, "a third is dead"
    folder.write(range(2, 5), added=10)
    assert not set(first) & set(folder.packs()), "five of six are dead, and the last one was copied"
    files = PackedLatents("sd")
    assert [same(files.read(place), cached(n + 10 * (n < 5))) for n, place in enumerate(folder.places)] == [True] * 6
    size = sum(path.stat().st_size for path in folder.packs())
    folder.write(range(6))
    assert len(folder.packs()) == 1 and folder.packs()[0].stat().st_size < size and folder.reasons() == [None] * 6


def test_many_small_packs_become_one_and_a_full_one_is_followed_by_another(folder, monkeypatch):
    monkeypatch.setattr(folder_packs, "MAX_SMALL", 3)
    for number in range(6):
        folder.write(range(number, number + 1))
    assert len(folder.packs()) == 3 and folder.reasons() == [None] * 6
    shutil.rmtree(folder.path)
    folder = Folder(folder.path)
    monkeypatch.setattr(packed_latents, "MAX_BYTES", 900)
    files = PackedLatents("sd")
    for number in range(3):
        files.write(folder.places[number], cached(number), None)
    files.finish()
    assert len(folder.packs()) == 3 and all(files.has(place) for place in folder.places[:3])


def test_who_reads_goes_on_when_another_run_puts_packs_together(folder):
    folder.write(range(6))
    reader = PackedLatents("sd")
    list(reader.examine([(place, folder.wanted(n)) for n, place in enumerate(folder.places)]))
    folder.write(range(4), added=10)
    assert same(reader.read(folder.places[5]), cached(5)) and same(reader.read(folder.places[0]), cached(10))


def other_writer(pack: Path, pid: int) -> Path:
    """The same pack, as of another process."""
    return pack.rename(pack.with_name(pack.name.replace(f"-{MACHINE}-{os.getpid()}-", f"-{MACHINE}-{pid}-")))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.8, 0.99, 1.0])
def test_a_torn_pack_keeps_its_whole_entries_once_its_writer_is_gone(share, folder):
    folder.write(range(6))
    (pack,) = folder.packs()
    entries = read_entries(pack)
    pack.write_bytes(pack.read_bytes()[: int(share * (pack.stat().st_size - 1))])
    ends = [*entries.rows["entry"][1:].tolist(), entries.end]
    whole = sum(end <= pack.stat().st_size for end in ends)
    living = other_writer(pack, os.getppid())
    PackedLatents("sd").clear_up([str(folder.path)])
    assert folder.packs() == [living] and folder.reasons() == [ABSENT] * 6, "it may still be written to"
    other_writer(living.rename(pack), 2**22 + 1)  # above the process ids of Linux
    files = PackedLatents("sd")
    files.clear_up([str(folder.path)])
    assert folder.reasons() == [None] * whole + [ABSENT] * (6 - whole)
    assert all(same(files.read(place), cached(n)) for n, place in enumerate(folder.places[:whole]))
    folder.write(range(6), added=20)
    assert folder.reasons() == [None] * 6


def test_damaged_numbers_are_found_where_they_are_read_and_at_the_next_start(folder):
    folder.write(range(6))
    (pack,) = folder.packs()
    rows, data = read_entries(pack).rows, bytearray(pack.read_bytes())
    data[int(rows["numbers"][2]) + 5] ^= 4
    pack.write_bytes(data)
    assert folder.reasons() == [None] * 6
    reader = PackedLatents("sd")
    for _ in range(3):
        with pytest.raises(UserError, match=r"图 2_0300x0400_sd\.npz are damaged in .*\.pack; train again"):
            reader.read(folder.places[2])
    assert len(folder.packs()) == 2
    assert folder.reasons() == [None, None, BROKEN, None, None, None] and not PackedLatents("sd").has(folder.places[2])
    folder.write(range(2, 3))
    assert folder.reasons() == [None] * 6


def test_a_pack_that_is_cut_off_or_removed_while_it_is_mapped_is_a_sentence(folder):
    folder.write(range(6))
    (pack,) = folder.packs()
    reader = used(folder)
    os.truncate(pack, 3000)
    with pytest.raises(UserError, match="are damaged in"):
        reader.read(folder.places[5])
    for path in folder.packs():
        path.unlink()
    with pytest.raises(UserError, match="are no longer in the packs of their folder"):
        PackedLatents("sd").read(folder.places[0])


def test_rows_that_tell_of_bytes_that_are_not_there_make_a_pack_unreadable(folder):
    for field, value in {"num_bytes": 2**63, "numbers": 2**62, "shape": 2**32 - 1, "vae": 9, "masked": 1}.items():
        path = new_pack(str(folder.path), "sd", 1)
        writer = PackWriter(path)
        writer.add("a", cached(0), Origin(FileMark(1, 2, 3), None, "x", SKETCH))
        row = np.frombuffer(bytearray(writer.noted[0].row), ROW)
        row[field] = value
        writer.noted[0].row = row.tobytes()
        writer.finish()
        with pytest.raises(ValueError, match="does not fit"):
            read_entries(path)


def test_a_pipe_in_the_place_of_a_pack_is_not_waited_for(folder):
    if hasattr(os, "mkfifo"):
        os.mkfifo(new_pack(str(folder.path), "sd", 1))
        assert folder.reasons() == [ABSENT] * 6
        PackedLatents("sd").clear_up([str(folder.path)])


def test_entries_are_checked_without_reading_their_numbers(folder):
    """The index alone is read: a pack whose numbers are gone is checked as well as a whole one."""
    folder.write(range(6))
    (pack,) = folder.packs()
    data = pack.read_bytes()
    end = read_entries(pack).end
    pack.write_bytes(bytes(end) + data[end:])
    assert folder.reasons() == [None] * 6 and len(data) > end + TRAILER.size
