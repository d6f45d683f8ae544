"""The packs of one folder: all entries together, what is wrong with them, and which packs are to go."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from library.dataset.cache_check import (
    ABSENT,
    BROKEN,
    NOT_MIRRORED,
    OTHER_MASK,
    OTHER_PICTURE,
    OTHER_RESIZING,
    OTHER_SIZE,
    UNMASKED,
    Finding,
    WantedLatents,
    is_same_mask,
)
from library.dataset.file_marks import FileMark
from library.dataset.latent_pack import ROW, UNREADABLE, Entries, read_entries
from library.dataset.pack_files import packs_in

SMALL_BYTES, MAX_SMALL = 2**26, 16  # more packs that are so small become one
HEAD_BYTES = 512.0  # of an entry, about


class FolderPacks:
    """All latents in the packs of a folder, the newest of each name."""

    def __init__(self, folder: str, family: str):
        self.paths: list[Path] = []
        parts: list[Entries] = []
        for path in packs_in(folder, family):
            with suppress(*UNREADABLE):  # another run is writing it
                parts.append(read_entries(path))
                self.paths.append(path)
        self.entries = _joined(parts)
        self.pack_of = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])  # [N]
        self.place_of = dict(zip(self.entries.names, range(len(self.entries.names)), strict=True))
        self.is_proven = bytearray(len(self.entries.names))  # those whose checksum was compared
        self.damaged: set[str] = set()  # names of those that were found to be

    def found(self, names: list[str]) -> np.ndarray:
        """The places of the entries, -1 where there is none."""
        return np.array([self.place_of.get(name, -1) for name in names], dtype=np.int64)


def findings_of(packs: FolderPacks, names: list[str], wanted: list[WantedLatents]) -> list[Finding]:
    """What is wrong with the entries of one folder, in columns where it is asked of all of them."""
    found = packs.found(names)
    if not packs.place_of:
        return [Finding(ABSENT)] * len(names)
    rows = packs.entries.rows[found]
    sizes_wh, buckets_wh, crops_ltrb, mirrored, masked, is_gone = (
        np.array([getattr(item, name) for item in wanted])
        for name in ("original_size_wh", "bucket_wh", "crop_ltrb", "mirrored", "masked", "is_gone")
    )
    same_size = (rows["size_wh"] == sizes_wh).all(1) & (rows["shape"][:, :0:-1] == buckets_wh // 8).all(1)
    same_size &= (abs(rows["crop_ltrb"] - crops_ltrb) <= 1).all(1)
    has_origin = rows["vae"] != 0
    resized = packs.entries.resized
    same_resizing = np.array([resized[at] == item.resized for at, item in zip(found, wanted, strict=True)])
    reasons = {
        ABSENT: found < 0,
        BROKEN: rows["numbers"] == 0,
        OTHER_SIZE: ~same_size,
        NOT_MIRRORED: mirrored & (rows["mirrored"] == 0),
        UNMASKED: masked & (rows["masked"] == 0),
        OTHER_PICTURE: ~is_gone & ~_of_these_pictures(rows, wanted),
        OTHER_RESIZING: ~is_gone & has_origin & ~same_resizing,
    }
    names_of_reasons = [*reasons, None, OTHER_MASK]
    first = np.argmax([*reasons.values(), np.ones(len(found), bool)], axis=0)
    for place in np.flatnonzero(masked & ~is_gone & (first == len(reasons))):
        if not _is_of_mask(rows[place], wanted[place].mask):
            first[place] = names_of_reasons.index(OTHER_MASK)
    sketches = [None, *packs.entries.sketches]
    return [
        Finding(names_of_reasons[reason], sketches[sketch])
        for reason, sketch in zip(first.tolist(), rows["vae"].tolist(), strict=True)
    ]


def doomed_packs(packs: FolderPacks) -> set[int]:
    """The packs of a folder that are to go, once what is of use in them is elsewhere."""
    newest = np.fromiter(packs.place_of.values(), np.int64, len(packs.place_of))
    sizes = packs.entries.rows["num_bytes"] + HEAD_BYTES
    all_bytes = np.bincount(packs.pack_of, sizes)
    used_bytes = np.bincount(packs.pack_of[newest], sizes[newest], minlength=len(all_bytes))
    small = np.flatnonzero(used_bytes < SMALL_BYTES)
    return {*np.flatnonzero(2 * used_bytes < all_bytes), *(small if len(small) > MAX_SMALL else ())}


def _joined(parts: list[Entries]) -> Entries:
    """The entries of several packs, as of one."""
    num_sketches, rows = 0, []
    for part in parts:
        rows.append(part.rows.copy())
        rows[-1]["vae"] += np.where(part.rows["vae"] != 0, num_sketches, 0).astype(np.uint32)
        num_sketches += len(part.sketches)
    return Entries(
        np.concatenate(rows) if rows else np.zeros(0, ROW),
        [name for part in parts for name in part.names],
        [resized for part in parts for resized in part.resized],
        [sketch for part in parts for sketch in part.sketches],
        0,
    )


def _of_these_pictures(rows: np.ndarray, wanted: list[WantedLatents]) -> np.ndarray:
    """Which entries are of their pictures as these are now: made from them or copies, or not older, where unknown."""
    marks = np.array([_size_and_time(item.picture) for item in wanted], dtype=np.int64)  # [N, 2]
    same = (rows["picture"][:, :2] == marks).all(1)
    for place in np.flatnonzero(~same & (rows["picture"][:, 0] == marks[:, 0])):
        same[place] = FileMark.from_array(rows["picture"][place]).fits(wanted[place].picture)
    return np.where(rows["vae"] != 0, same, rows["written_ns"] >= marks[:, 1])


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _is_of_mask(row: np.ndarray, mask: Path | None) -> bool:
    if not row["vae"]:
        return mask is None or int(row["written_ns"]) >= mask.stat().st_mtime_ns
    return is_same_mask(FileMark.from_array(row["mask"]) if row["has_mask_picture"] else None, mask)
