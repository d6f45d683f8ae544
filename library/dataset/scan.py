"""From folders to records: every picture's size and caption, found and checked without decoding a pixel."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, NamedTuple

from library.dataset.captions import takes_tags_apart
from library.dataset.collecting import collector_paused
from library.dataset.config import DatasetSpec, Size, SubsetOptions, spec_from_flags
from library.dataset.dataset_config import read_dataset_config
from library.dataset.faces import face_of
from library.dataset.folder import Folder, read_folder
from library.dataset.info_cache import write_info
from library.dataset.metadata_file import read_metadata_file, subset_of_in_json
from library.dataset.own_class import load_own_dataset
from library.dataset.picture_files import Decoded, Progress, decode_pictures, unreadable_reason, upright_size
from library.dataset.picture_index import PictureIndex
from library.dataset.repeat_folders import folder_notes, subsets_from_folders
from library.errors import UserError, counted, quoted_list


class ImageRecord(NamedTuple):
    """One picture of the dataset."""

    file: str  # its path; a Path of each takes longer than all else of a second start
    size_wh: tuple[int, int]  # pixels, upright as training sees it
    caption: str
    caption_found: bool
    subset: int  # index into ScannedDataset.subsets
    mask_path: Path | None = None  # a picture whose red channel weighs the loss
    is_gone: bool = False  # only its latents are on disk

    @property
    def path(self) -> Path:
        return Path(self.file)


@dataclass
class ScannedDataset:
    """All pictures of all subsets, and what is worth telling about them."""

    subsets: list[SubsetOptions]
    records: list[ImageRecord]
    notes: list[str]
    specs: list[DatasetSpec] = field(default_factory=list)  # one for each dataset
    num_held_out: int = 0  # pictures kept for validation, which are not among the records
    own: Any = None  # with --dataset_class: the user's dataset, which takes the place of the records


def scan_dataset(
    options: Any,
    progress: Progress | None = None,
    index: PictureIndex | None = None,
    damaged: list[str] | None = None,
) -> ScannedDataset:
    """The dataset of --dataset_class, --dataset_config or --in_json, or of --train_data_dir and --reg_data_dir.

    Pictures that cannot be read are added to `damaged` and left out; where it is None, they are a UserError.
    """
    if options.dataset_class:
        return ScannedDataset([], [], [], own=load_own_dataset(options))
    if options.dataset_config:
        specs, subsets, notes = read_dataset_config(options)
    elif options.in_json:
        specs, subsets, notes = [spec_from_flags(options)], [subset_of_in_json(options)], []
    else:
        specs, subsets, notes = [spec_from_flags(options)], subsets_from_folders(options), folder_notes(options)
    scanned = scan(subsets, progress, latents_suffice=options.cache_latents_to_disk, index=index, damaged=damaged)
    scanned = replace(scanned, specs=specs)
    notes = notes + scanned.notes + _face_crop_notes(scanned) + _separator_notes(scanned) + _mask_notes(subsets)
    return replace(scanned, notes=notes)


@collector_paused()
def scan(
    subsets: list[SubsetOptions],
    progress: Progress | None = None,
    latents_suffice: bool = False,
    index: PictureIndex | None = None,
    damaged: list[str] | None = None,
) -> ScannedDataset:
    """Read names, sizes and captions of all pictures; everything unreadable is named in one UserError, or `damaged`.

    With latents_suffice, latents on disk stand in for a picture that a metadata file names and that is gone. What
    `index` remembers is not read again.
    """
    index = index or PictureIndex()
    folders = [
        read_metadata_file(subset, latents_suffice) if subset.metadata_file else read_folder(subset, index)
        for subset in subsets
    ]
    num_pictures = sum(len(folder.pictures) for folder in folders)
    records: list[ImageRecord] = []
    unreadable: list[str] = []
    for number, folder in enumerate(folders):
        records += _records(folder, number, index, unreadable)
        if progress:
            progress(len(records) + len(unreadable), num_pictures)
    if damaged is not None:
        damaged += unreadable
        unreadable = []
    if unreadable:  # say at once what else is damaged
        unreadable += _decoded(records, index)[1]
    problems = [unreadable_pictures(unreadable)] if unreadable else []
    problems += [problem for folder in folders for problem in folder.problems]
    if not problems and not any(folder.pictures for folder in folders if not folder.subset.is_reg):
        problems.append(_no_pictures([str(subset.source) for subset in subsets if not subset.is_reg]))
    if problems:
        raise UserError(*problems)
    notes = [note for folder in folders for note in folder.notes]
    return ScannedDataset([folder.subset for folder in folders], records, notes)


def _no_pictures(sources: list[str]) -> str:
    if not sources:
        return "all subsets hold regularisation pictures (is_reg = true); at least one must hold what is trained"
    return f"there are no pictures in {quoted_list(sources)}"


def verify_pictures(
    records: Iterable[ImageRecord],
    num_threads: int | None = None,
    progress: Progress | None = None,
    index: PictureIndex | None = None,
    damaged: list[str] | None = None,
) -> dict[str, Decoded]:
    """Decode every picture that `index` does not know, note it there, and return what all of them are.

    All that are damaged are named in one UserError, or added to `damaged`.
    """
    decoded, found = _decoded(records, index or PictureIndex(), num_threads, progress)
    if found and damaged is None:
        raise UserError(unreadable_pictures(found))
    if damaged is not None:
        damaged += found
    return decoded


def _decoded(
    records: Iterable[ImageRecord],
    index: PictureIndex,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Decoded], list[str]]:
    files = dict.fromkeys(record.file for record in records if not record.is_gone)
    known = index.known(files)
    decoded, damaged = decode_pictures(files.keys() - known.keys(), num_threads, progress, index.note)
    return known | decoded, damaged


def as_decoded(scanned: ScannedDataset, decoded: dict[str, Decoded]) -> ScannedDataset:
    """The dataset with its pictures as they were decoded: their sizes, and notes on what had not been known of them."""
    scanned = _with_sizes(scanned, decoded)
    opaque = {file for file, picture in decoded.items() if picture.is_opaque}
    return replace(scanned, notes=scanned.notes + _opacity_notes(scanned, opaque))


def _with_sizes(scanned: ScannedDataset, decoded: dict[str, Decoded]) -> ScannedDataset:
    right = {r.file: d.size_wh for r in scanned.records if (d := decoded.get(r.file)) and d.size_wh != r.size_wh}
    if not right:
        return scanned
    wrong = [r for r in scanned.records if r.file in right]
    listed = quoted_list([f"{r.file}: {_by(right[r.file])}, not {_by(r.size_wh)}" for r in wrong], limit=3)
    records = [r._replace(size_wh=right.get(r.file, r.size_wh)) for r in scanned.records]
    notes = [*scanned.notes, f"wrong sizes noted for {counted(len(wrong), 'picture')} are put right ({listed})"]
    return replace(scanned, records=records, notes=notes)


def write_info_caches(scanned: ScannedDataset) -> list[str]:
    """Write the metadata_cache.json of the folders that keep one; notes on those that cannot be written."""
    notes = []
    for index, subset in enumerate(scanned.subsets):
        if subset.cache_info:
            mine = [(r.file, r.caption, r.size_wh) for r in scanned.records if r.subset == index]
            notes += write_info(subset.image_dir, mine)
    return notes


def tag_frequency(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """For each folder or metadata file, how often each comma-separated tag stands in its captions, without repeats.

    Of datasets that share one, only the first counts.
    """
    frequency: dict[str, Counter[str]] = {}
    dataset_of: dict[str, int] = {}
    for record in scanned.records:
        subset = scanned.subsets[record.subset]
        if dataset_of.setdefault(subset.source.name, subset.dataset) == subset.dataset:
            tags = (tag.strip().lower() for tag in record.caption.split(","))
            frequency.setdefault(subset.source.name, Counter()).update(tag for tag in tags if tag)
    return {name: dict(counts) for name, counts in frequency.items()}


def dataset_dirs(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """Repeats and pictures of each training folder, for the metadata."""
    return _dirs(scanned, is_reg=False)


def reg_dataset_dirs(scanned: ScannedDataset) -> dict[str, dict[str, int]]:
    """Repeats and pictures of each regularisation folder, for the metadata."""
    return _dirs(scanned, is_reg=True)


def _mask_notes(subsets: list[SubsetOptions]) -> list[str]:
    return [
        f"alpha_mask has no effect on {subset.source}: its masks are in {subset.conditioning_data_dir}"
        for subset in subsets
        if subset.alpha_mask and subset.conditioning_data_dir
    ]


def _opacity_notes(scanned: ScannedDataset, opaque: set[str]) -> list[str]:
    """A sentence for each subset that takes masks from transparency and has pictures without any."""
    notes = []
    for index, subset in enumerate(scanned.subsets):
        mine = [record for record in scanned.records if record.subset == index]
        num_opaque = sum(record.file in opaque for record in mine)
        if subset.alpha_mask and not subset.conditioning_data_dir and num_opaque:
            total = counted(len(mine), "picture")
            part = f"{num_opaque} of {total} of {subset.source}"
            notes.append(f"alpha_mask has no effect on {part}: nothing is transparent")
    return notes


def _separator_notes(scanned: ScannedDataset) -> list[str]:
    """A sentence for each subset whose captions keep the mark that keep_tokens_separator puts into them."""
    left = {
        record.subset: mark
        for record in scanned.records
        if (mark := scanned.subsets[record.subset].keep_tokens_separator)
        and mark in record.caption
        and not takes_tags_apart(scanned.subsets[record.subset])
    }
    return [
        f"keep_tokens_separator {mark} stays in the captions of {scanned.subsets[index].source}: "
        "only shuffle_caption, caption_tag_dropout_rate and token_warmup_step take it out"
        for index, mark in left.items()
    ]


def _face_crop_notes(scanned: ScannedDataset) -> list[str]:
    """What stands in the way of face_crop_aug_range, one sentence a subset."""
    notes = []
    for index, subset in enumerate(scanned.subsets):
        if subset.face_crop_aug_range is None:
            continue
        mine = [record for record in scanned.records if record.subset == index]
        num_faces = sum(face_of(record.path) is not None for record in mine)
        if scanned.specs[subset.dataset].enable_bucket:
            notes.append(f"face_crop_aug_range has no effect on {subset.source}: enable_bucket crops without faces")
        elif num_faces < len(mine):
            rest = f"{len(mine) - num_faces} of {len(mine)} pictures of {subset.source} have no face in their names"
            notes.append(f"{rest} (x_<centre x>_<centre y>_<width>_<height>): face_crop_aug_range leaves them alone")
    return notes


def _dirs(scanned: ScannedDataset, is_reg: bool) -> dict[str, dict[str, int]]:
    num_pictures = Counter(record.subset for record in scanned.records)
    dirs: dict[str, dict[str, int]] = {}
    for index, subset in enumerate(scanned.subsets):
        if subset.is_reg == is_reg and num_pictures[index]:
            name = subset.source.name
            others = (f"{name} ({number})" for number in count(2))
            name = next(candidate for candidate in chain([name], others) if candidate not in dirs)
            dirs[name] = {"n_repeats": subset.num_repeats, "img_count": num_pictures[index]}
    return dirs


def _records(folder: Folder, subset: int, index: PictureIndex, unreadable: list[str]) -> list[ImageRecord]:
    """The records of a folder; pictures without one, with reasons, are added to `unreadable`."""
    names, files = folder.pictures, folder.files()
    sizes = list(map(folder.sizes.get, names))
    unknown = [place for place, size_wh in enumerate(sizes) if size_wh is None]
    for place in unknown:
        try:
            sizes[place] = index.size_of(files[place]) or upright_size(files[place])
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            unreadable.append(f"{files[place]} ({unreadable_reason(files[place], error)})")
    captions = list(map(folder.captions.get, names))
    are_found: Iterable[bool] = repeat(True)
    if None in captions:
        are_found = [caption is not None for caption in captions]
        fallback = folder.subset.class_tokens or ""
        captions = [fallback if caption is None else caption for caption in captions]
    masks = map(folder.masks.get, names) if folder.masks else repeat(None)
    are_gone = map(folder.gone.__contains__, names) if folder.gone else repeat(False)
    rows = zip(files, sizes, captions, are_found, repeat(subset), masks, are_gone, strict=False)
    made = partial(tuple.__new__, ImageRecord)  # the NamedTuple's own constructor takes twice as long
    records = list(map(made, rows))
    return [record for record in records if record.size_wh] if unknown else records


def _by(size_wh: Size) -> str:
    return f"{size_wh[0]}x{size_wh[1]}"


def unreadable_pictures(pictures: list[str]) -> str:
    return f"{counted(len(pictures), 'picture')} cannot be read: " + ", ".join(sorted(pictures))
