"""Large folders are looked at by several processes: what they find is what one finds."""

import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from library.dataset import other_processes
from library.dataset.caption_files import caption_of, captions_in
from library.dataset.config import SubsetOptions
from library.dataset.other_processes import GONE, MAX_BYTES, OtherProcess, contents, shares, statuses
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import scan, verify_pictures

pytestmark = pytest.mark.skipif(os.stat not in os.supports_dir_fd, reason="Windows needs no other processes")
NUM_PICTURES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "中文 路径"
    folder.mkdir()
    for number in range(NUM_PICTURES):
        Image.new("RGB", (32 + number, 40)).save(folder / f"图 {number:02d}.png")
        (folder / f"图 {number:02d}.txt").write_text(f"中文, {number}", "gbk" if number == 3 else "utf-8")
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    return folder


@pytest.fixture(params=[2, 3, 4])
def several(request, monkeypatch):
    """So many processes, for the smallest folder."""
    monkeypatch.setattr(other_processes, "WORTH_IT", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(request.param), raising=False)


def start(folder: Path) -> list:
    index = PictureIndex()
    scanned = scan([SubsetOptions(image_dir=folder, caption_extension=".txt")], index=index)
    verify_pictures(scanned.records, index=index)
    index.write()
    return scanned.records, scanned.notes


def test_another_process_finds_what_this_one_finds(folder):
    (folder / "a\nb.txt").write_bytes(b"")
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "long.txt").write_bytes(b"x" * (MAX_BYTES + 1))
    names = [*sorted(os.listdir(folder)), "gone.txt"]
    handle = os.open(folder, os.O_RDONLY)
    here, read = contents(names, handle)
    looked = statuses(names, handle)
    os.close(handle)
    assert OtherProcess(str(folder), names).found() == (looked, b"")
    assert OtherProcess(str(folder), names, reads=True).found() == (here, read)
    sizes = dict(zip(names, here[::2], strict=True))
    assert sizes["gone.txt"] == sizes["long.txt"] == sizes["nul.txt"] == GONE and sizes["a\nb.txt"] == 0
    assert dict(zip(names, looked[::2], strict=True))["long.txt"] == MAX_BYTES + 1
    parts = dict(zip(names, read.split(b"\0"), strict=True))
    assert parts["a\nb.txt"] == parts["nul.txt"] == b"" and parts[os.fsdecode(b"\xff.txt")] == b"\xff"


def test_each_file_is_in_one_share(several):
    for count in range(2, 50):
        names = [str(number) for number in range(count)]
        parts = shares(names, 0.25 * count)
        assert sum(parts, []) == names
        assert len(parts[0]) <= min(map(len, parts[1:]))
        assert shares(names, 5 * count)[0] == []


@pytest.mark.parametrize("other", [b"", "猫".encode(), "猫".encode("gbk"), "猫".encode("utf-8-sig"), b"\xff"])
def test_captions_read_at_once_are_what_they_are_one_by_one(other):
    contents, times = ["狗, a".encode(), other, b"b"], [5, 6, 7]
    assert captions_in(b"\0".join(contents), times) == list(map(caption_of, contents, times))


def test_starts_are_the_same_with_several_processes(folder, several, monkeypatch):
    cold, warm = start(folder), start(folder)
    (folder / ".athanor_index").unlink()
    monkeypatch.setattr(other_processes, "WORTH_IT", 10**9)
    assert cold == warm == start(folder)
    assert [record.caption for record in cold[0]] == [f"中文, {number}" for number in range(NUM_PICTURES)]


@pytest.mark.parametrize("number", [0, 5, NUM_PICTURES - 1])
def test_a_change_in_any_share_is_found(folder, several, number):
    start(folder)
    (folder / f"图 {number:02d}.txt").write_text("狗")
    Image.new("RGB", (99, 98)).save(folder / f"图 {number:02d}.png")
    (folder / f"图 {(number + 1) % NUM_PICTURES:02d}.txt").unlink()
    changed = start(folder)[0][number]
    assert (changed.caption, changed.size_wh) == ("狗", (99, 98))
    assert not start(folder)[0][(number + 1) % NUM_PICTURES].caption_found


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false"])
def test_without_other_processes_this_one_does_it(folder, several, monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    first = start(folder)
    assert start(folder) == first
    assert [record.caption for record in first[0]] == [f"中文, {number}" for number in range(NUM_PICTURES)]
