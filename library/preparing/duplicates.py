"""Pictures that are in a folder more than once: found, shown, and moved away."""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from library.dataset.likeness import Groups, like_pictures, same_pictures
from library.dataset.picture_files import Decoded, decode_pictures
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import unreadable_pictures
from library.errors import UserError, counted, one_line
from library.files import failed_writes_told
from library.folders import check_writable
from library.panels import BLACK, ORANGE, Layout, Line, Panel, Tile, fitted
from library.preparing.jobs import copy_file
from library.preparing.picture_io import read_picture
from library.preparing.sheets import write_sheets
from library.preparing.sources import Source, check_apart, sources_in
from library.training.reports import aligned

logger = logging.getLogger(__name__)

LAYOUT = Layout(picture=220, columns=7)


@dataclass(frozen=True)
class Group:
    """Pictures that are one picture: the one to keep, and the others."""

    kept: Source
    others: list[Source]

    @property
    def all(self) -> list[Source]:
        return [self.kept, *self.others]


def find_duplicates(options: Any) -> None:
    """Find the pictures that are there more than once, as the options of `find_duplicates.py` say."""
    folder = Path(options.src_dir)
    apart = Path(options.move_to) if options.move_to else None
    if apart and (problems := check_apart(folder, apart, "--src_dir", "--move_to")):
        raise UserError(*problems)
    sources = sources_in(folder, "--src_dir", left_out=apart)
    if apart and (problems := check_writable("move_to", str(apart))):
        raise UserError(*problems)
    decoded, damaged = decoded_pictures(sources)
    groups = groups_of(sources, decoded, None if options.exact else options.max_bits)
    if groups:
        print(table(groups, decoded), flush=True)
    num_others = sum(len(group.others) for group in groups)
    logger.info("%s among %s", counted(num_others, "duplicate"), counted(len(sources), "picture"))
    if groups and options.sheet:
        write_sheets(panels_of(groups, decoded), f"duplicates in {folder}", Path(options.sheet), LAYOUT)
    if groups and apart:
        move_away(groups, sources, apart)
        logger.info("%s moved to %s, with their captions", counted(num_others, "duplicate"), apart)
    if damaged:
        raise UserError(unreadable_pictures(damaged))


def decoded_pictures(sources: Iterable[Source]) -> tuple[dict[str, Decoded], list[str]]:
    """What each picture is, and the damaged ones with reasons; what is known of them from before is not read again."""
    index = PictureIndex()
    files = [str(source.path) for source in sources]
    known = index.known(files)
    with tqdm(desc="reading pictures", unit="pictures", total=len(files), initial=len(known)) as bar:
        try:
            new, damaged = decode_pictures(
                [file for file in files if file not in known],
                progress=lambda done, total: bar.update(),
                note=index.note,
            )
        finally:
            index.write()
    return known | new, damaged


def groups_of(sources: Iterable[Source], decoded: Mapping[str, Decoded], max_bits: int | None) -> list[Group]:
    """The pictures with the same bytes or, but for None, nearly the same look; of each group the largest is kept."""
    by_file = {str(source.path): source for source in sources}
    found = same_pictures(decoded) + ([] if max_bits is None else like_pictures(decoded, max_bits))

    def worth(file: str) -> tuple[int, int, bool, int]:
        picture, has_caption = decoded[file], bool(by_file[file].companions)
        return picture.size_wh[0] * picture.size_wh[1], picture.num_bytes, has_caption, -len(file)  # "a", not "a (1)"

    groups = []
    for files in joined(found):
        kept = max(files, key=worth)  # the first of equals
        groups.append(Group(by_file[kept], [by_file[file] for file in files if file != kept]))
    return groups


def joined(groups: Groups) -> Groups:
    """Groups that share a member made one, sorted."""
    merged: list[set[str]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching] + [set(group).union(*touching)]
    return sorted(sorted(group) for group in merged)


def table(groups: list[Group], decoded: Mapping[str, Decoded]) -> str:
    """Every picture of every group, the kept one first."""
    rows = [("group", "", "size", "kB", "same bytes", "picture")]
    for number, group in enumerate(groups, start=1):
        for source in group.all:
            one, kept = decoded[str(source.path)], decoded[str(group.kept.path)]
            is_kept = source is group.kept
            width, height = one.size_wh
            same = "" if is_kept else "yes" if one.content == kept.content else "no"
            facts = (f"{width}x{height}", f"{one.num_bytes / 1000:.0f}", same)
            rows.append((str(number), "keep" if is_kept else "duplicate", *facts, one_line(str(source.inside))))
    return aligned(rows, numbers=(0, 3))


def panels_of(groups: list[Group], decoded: Mapping[str, Decoded]) -> list[Panel]:
    """A panel for each group, duplicates in frames."""

    def tile(source: Source, is_kept: bool) -> Tile:
        one = decoded[str(source.path)]
        picture = fitted(Image.fromarray(read_picture(source.path).opaque), LAYOUT.picture)
        facts = (
            f"{'kept' if is_kept else 'duplicate'}, {one.size_wh[0]}x{one.size_wh[1]}, {one.num_bytes / 1000:.0f} kB"
        )
        lines = (Line(source.inside.as_posix(), BLACK), Line(facts, BLACK if is_kept else ORANGE))
        return Tile(picture, lines, is_framed=not is_kept)

    return [
        Panel(f"group {number}", [tile(source, source is group.kept) for source in group.all])
        for number, group in enumerate(groups, start=1)
    ]


def move_away(groups: list[Group], sources: Iterable[Source], folder: Path) -> None:
    """Move the duplicates with their captions; a caption that a picture which stays has too is copied."""
    going = {source.path for group in groups for source in group.others}
    staying = {
        (source.path.parent, name) for source in sources if source.path not in going for name in source.companions
    }
    for group in groups:
        for source in group.others:
            names = [source.path.name, *source.companions]
            target = _free_place(folder / source.inside.parent, source.stem, names)
            for name in names:
                new = target.with_name(target.name + name[len(source.stem) :])
                place = source.path.with_name(name)
                if (source.path.parent, name) in staying:
                    copy_file(place, new)
                elif place.exists():  # else it went with another duplicate of its name
                    move_file(place, new)


def move_file(source: Path, target: Path) -> None:
    """Move a file, which is whole in one of the two places at any time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # such as from disk to disk
        os.rename(source, target)
        return
    copy_file(source, target)
    with failed_writes_told(source):
        source.unlink()


def _free_place(folder: Path, stem: str, names: list[str]) -> Path:
    """The folder with a stem under which none of the files is there yet."""
    number, candidate = 1, stem
    while any((folder / (candidate + name[len(stem) :])).exists() for name in names):
        number += 1
        candidate = f"{stem}-{number}"
    return folder / candidate
