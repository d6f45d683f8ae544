"""The index beside the pictures: what did not change is not read again, and what did is; a broken one is no harm."""

import os
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from library.dataset import picture_files, picture_index
from library.dataset.config import SubsetOptions
from library.dataset.index_file import Remembered, StoredIndex, packed
from library.dataset.opened_folder import OpenedFolder
from library.dataset.picture_index import NAME, FolderIndex, PictureIndex
from library.dataset.scan import ScannedDataset, scan, verify_pictures
from library.errors import UserError

NAMES = ("a.png", "图 片.jpg", "é b.webp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions an hour old, scanned once."""
    folder = tmp_path / "中文 路径"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (48 + number, 32), (number, 2, 3)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"猫, {name}", encoding="utf-8")
    age(*folder.iterdir())
    start(folder)
    return folder


def unpacked(data: bytes) -> Remembered:
    stored = StoredIndex(data)
    return Remembered(stored.pictures, stored.captions, stored.audit, stored.listing)


def age(*files: Path) -> None:
    """Make files seem to have been written an hour ago."""
    for path in files:
        os.utime(path, (time.time() - 3600,) * 2)


def start(folder: Path) -> ScannedDataset:
    """Read a folder as a start of training does."""
    index = PictureIndex()
    try:
        scanned = scan([SubsetOptions(image_dir=folder, caption_extension=".txt")], index=index)
        verify_pictures(scanned.records, index=index)
        return scanned
    finally:
        index.write()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that Pillow opens."""
    names: list[str] = []
    real = Image.open

    def note_and_open(file, **options):
        names.append(Path(getattr(file, "name", file)).name)
        return real(file, **options)

    monkeypatch.setattr(picture_files.Image, "open", note_and_open)
    return names


def overwrite(path: Path, data: bytes, keeps_time: bool) -> None:
    """Other bytes of the same number; with or without another time of change."""
    assert len(data) == path.stat().st_size
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns + (0 if keeps_time else 1_000_000)
    path.write_bytes(data)
    os.utime(path, ns=times)


def test_second_start_opens_nothing_and_gives_the_same(folder, opened):
    first = [(folder / name).stat().st_size for name in NAMES]
    scanned = start(folder)
    assert opened == []
    assert sorted((r.path.name, r.size_wh, r.caption) for r in scanned.records) == sorted(
        (name, (48 + number, 32), f"猫, {name}") for number, name in enumerate(NAMES)
    )
    assert first == [(folder / name).stat().st_size for name in NAMES]


def test_a_picture_is_known_by_size_and_time_alone(folder, opened):
    path = folder / "a.png"
    zeros = bytes(path.stat().st_size)  # no picture any more
    overwrite(path, zeros, keeps_time=True)
    start(folder)
    assert opened == []
    overwrite(path, zeros, keeps_time=False)
    with pytest.raises(UserError, match="a.png"):
        start(folder)
    assert set(opened) == {"a.png"}


def test_only_what_changed_is_read(folder, opened):
    Image.new("RGB", (20, 10)).save(folder / "new.png")
    (folder / "a.png").unlink()
    age(folder / "图 片.jpg", folder / "new.png")
    start(folder)
    assert set(opened) == {"图 片.jpg", "new.png"}
    opened.clear()
    assert len(start(folder).records) == 3
    assert opened == []
    assert set(FolderIndex(folder).pictures) == {"图 片.jpg", "é b.webp", "new.png"}


def test_captions_are_read_again_only_when_they_changed(folder):
    caption = folder / "a.txt"
    overwrite(caption, "狗, a.png".encode(), keeps_time=True)
    assert start(folder).records[0].caption == "猫, a.png"
    overwrite(caption, "狗, a.png".encode(), keeps_time=False)
    assert start(folder).records[0].caption == "狗, a.png"


def test_good_pictures_are_remembered_where_one_is_damaged(folder, opened):
    (folder / "a.png").write_bytes(b"no picture")
    for _ in range(2):
        opened.clear()
        with pytest.raises(UserError, match="a.png"):
            start(folder)
        assert set(opened) == {"a.png"}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"another program's".ljust(64),
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:7] + b"\x7f" + data[8:],
    ],
    ids=["empty", "cut", "longer", "foreign", "flipped bit", "other version"],
)
def test_a_broken_index_is_ignored_and_written_anew(folder, opened, change):
    good = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(change(good))
    assert len(start(folder).records) == 3
    assert set(opened) == set(NAMES)
    assert unpacked((folder / NAME).read_bytes()) == unpacked(good)


def test_index_with_a_size_of_zero_is_broken(folder):
    remembered = unpacked((folder / NAME).read_bytes())
    remembered.pictures["a.png"] = remembered.pictures["a.png"]._replace(size_wh=(0, 5))
    with pytest.raises(ValueError, match="without a size"):
        unpacked(packed(remembered))


@pytest.mark.parametrize("num_captions", [0, 2])
@pytest.mark.parametrize("num_pictures", [0, 2])
def test_index_reads_as_it_was_written(folder, num_pictures, num_captions):
    pictures, captions, audit, listing = unpacked((folder / NAME).read_bytes())
    assert len(listing) == 16
    some = dict(list(pictures.items())[:num_pictures]), dict(list(captions.items())[:num_captions])
    assert unpacked(packed(Remembered(*some, b"audit", listing))) == Remembered(*some, b"audit", listing)


def test_a_folder_that_cannot_be_written_goes_without(folder, monkeypatch):
    (folder / NAME).unlink()
    monkeypatch.setattr(picture_index, "write_bytes_whole", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))
    assert len(start(folder).records) == 3
    assert not (folder / NAME).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_names_that_are_no_text_are_kept(tmp_path, opened):
    Image.new("RGB", (8, 8)).save(tmp_path / os.fsdecode(b"\xff.png"))
    age(*tmp_path.iterdir())
    start(tmp_path)
    opened.clear()
    start(tmp_path)
    assert opened == []


def test_the_index_is_no_picture_and_no_caption(folder):
    assert {record.path.name for record in start(folder).records} == set(NAMES)
    assert not (folder / NAME).name.endswith((".txt", ".caption"))


def rename_over(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def png(size_wh: tuple[int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", size_wh).save(file, "PNG")
    return file.getvalue()


CHANGES = {
    "caption of the same length": lambda folder: (folder / "a.txt").write_text("狗, a.png", encoding="utf-8"),
    "caption renamed over": lambda folder: rename_over(folder / "a.txt", "狗, a.png".encode()),
    "caption removed": lambda folder: (folder / "a.txt").unlink(),
    "caption renamed": lambda folder: (folder / "a.txt").rename(folder / "b.txt"),
    "caption where there was none": lambda folder: (folder / "图 片.txt").write_text("a dog"),
    "picture in place": lambda folder: (folder / "a.png").write_bytes(png((20, 10))),
    "picture renamed over": lambda folder: rename_over(folder / "a.png", png((20, 10))),
    "picture added": lambda folder: (folder / "b.png").write_bytes(png((20, 10))),
    "picture removed": lambda folder: (folder / "a.png").unlink(),
    "picture renamed": lambda folder: (folder / "a.png").rename(folder / "b.png"),
    "pictures that change places": lambda folder: [
        (folder / old).rename(folder / new) for old, new in (("a.png", "x"), ("é b.webp", "a.png"), ("x", "é b.webp"))
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_kind_of_change_is_noticed(folder, change):
    (folder / "图 片.txt").unlink()
    start(folder)
    before, folder_times = start(folder).records, folder.stat()
    change(folder)
    os.utime(folder, ns=(folder_times.st_atime_ns, folder_times.st_mtime_ns))
    after = start(folder).records
    (folder / NAME).unlink()
    assert before != after == start(folder).records


def test_an_edit_within_one_step_of_a_coarse_clock_is_noticed(folder):
    """A file that was read as soon as it was written may be written again and keep its time."""
    caption = folder / "a.txt"
    caption.write_text("狗, a.png", encoding="utf-8")
    assert start(folder).records[0].caption == "狗, a.png"
    overwrite(caption, "鸟, a.png".encode(), keeps_time=True)
    assert start(folder).records[0].caption == "鸟, a.png"


def test_nothing_unchanged_is_read_again(folder, opened, monkeypatch):
    """Of 6 files, what is opened at a start where one caption is new."""
    read: list[str] = []
    real = OpenedFolder.read
    monkeypatch.setattr(OpenedFolder, "read", lambda self, name, reader: read.append(name) or real(self, name, reader))
    start(folder)
    assert (read, opened) == ([], [])
    (folder / "a.txt").write_text("a bird")
    start(folder)
    assert (read, opened) == (["a.txt"], [])


def test_an_unchanged_index_is_not_written_again(folder):
    written = (folder / NAME).stat().st_mtime_ns
    start(folder)
    assert (folder / NAME).stat().st_mtime_ns == written
    (folder / "notes.md").write_text("")  # a new name, and no picture
    start(folder)
    start_of_change = (folder / NAME).stat().st_mtime_ns
    assert start_of_change > written
    start(folder)
    assert (folder / NAME).stat().st_mtime_ns == start_of_change
