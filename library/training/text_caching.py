"""Captions encoded once into kohya's files beside the pictures, from which batches then take their conditioning."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from library.dataset.array_files import DAMAGED
from library.dataset.cache_check import ABSENT, BROKEN
from library.dataset.dataset import TrainingDataset
from library.dataset.latent_files import NUM_READERS
from library.dataset.text_cache import (
    OTHER_ENCODERS,
    Shapes,
    TextOrigin,
    TextOutputs,
    WantedText,
    examine_file,
    misfit,
    read_text,
    text_path,
    write_text,
)
from library.errors import UserError, quoted_list
from library.families.base import StoresText
from library.leftovers import remove_leftovers
from library.options.groups import TrainNetworkOptions
from library.training.caching import log_findings, spread
from library.training.known_sketches import Sketch, known_sketch

logger = logging.getLogger(__name__)

TOLERANCE = 0.03  # relative; the toy encoders of the tests are off by 0.012 in bf16, by 0.0016 in fp16
SENTENCE = "two red foxes asleep beside an old wooden boat, oil painting"
SKETCHED_TOKEN = 3  # of the sentence; the first is the same for all texts


@dataclass(frozen=True)
class TextFile:
    """The file of one record, and what must be in it."""

    path: Path
    wanted: WantedText


class Encoders:
    """The text encoders of a run, as files of their outputs see them; they stay unused until the first question.

    As with the VAE, encoders are known by what they make of a test sentence, whatever their format or number type.
    """

    def __init__(self, family: StoresText, options: TrainNetworkOptions):
        self.family, self.options = family, options

    def outputs(self, caption: str) -> TextOutputs:
        """What they make of a caption, float32."""
        return {name: value.float().cpu().numpy() for name, value in self.family.stored_text(caption).items()}

    @cached_property
    def _known(self) -> Sketch:
        options, family = self.options, self.family
        settings = f"{options.max_token_length} tokens, weights {options.weighted_captions}, skip {options.clip_skip}"
        what = f"text encoders of {family.name}, {settings}"
        return known_sketch(what, family.text_encoder_parts, family.dtype, self._of_sentence)

    def _of_sentence(self) -> Sketch:
        outputs = self.outputs(SENTENCE)
        vectors = [value[SKETCHED_TOKEN] if value.ndim == 2 else value for value in outputs.values()]
        joined = np.concatenate([vector / np.linalg.norm(vector) for vector in vectors])
        return Sketch(joined, {name: value.shape for name, value in outputs.items()})

    @property
    def shapes(self) -> Shapes:
        """Of the outputs of every caption."""
        return self._known.shapes

    @property
    def sketch(self) -> np.ndarray:
        """Of each output for the test sentence one vector, scaled to length 1; together [D]."""
        return self._known.values

    def made(self, sketch: np.ndarray) -> bool:
        """Whether another sketch is of these encoders."""
        return sketch.shape == self.sketch.shape and bool(np.linalg.norm(sketch - self.sketch) <= TOLERANCE)

    def may_have_made(self, outputs: TextOutputs, caption: str) -> bool:
        """Whether outputs are those of a caption, up to another number format."""
        pairs = [(outputs[name].astype(np.float32), value) for name, value in self.outputs(caption).items()]
        return all(np.linalg.norm(found - right) <= TOLERANCE * np.linalg.norm(right) for found, right in pairs)


def cache_text_on_disk(
    datasets: Sequence[TrainingDataset], family: StoresText, options: TrainNetworkOptions, accelerator: Accelerator
) -> None:
    """Give every record its file of text encoder outputs, after which the text encoders leave the device.

    Valid files are used, missing ones written; processes share the work.
    """
    encoders = Encoders(family, options)
    with accelerator.autocast():
        files = files_of(datasets, options.weighted_captions, encoders)
        if accelerator.is_main_process:
            remove_leftovers({file.path.parent for file in files})
        mine = files[accelerator.process_index :: accelerator.num_processes]
        if options.skip_cache_check:
            reasons = {file: ABSENT for file in mine if not file.path.is_file()}
        else:
            reasons = reasons_to_make(mine, encoders, accelerator)
        found = gather_object(list(reasons.items()))
        log_findings("text encoder outputs", len(files), Counter(reason for _, reason in found))
        to_make = [file for file, _ in found]
        broken = write_files(to_make[accelerator.process_index :: accelerator.num_processes], encoders, accelerator)
    if broken := gather_object(broken):
        names = quoted_list(sorted(map(str, broken)))
        raise UserError(f"the text encoders made NaN for {names}; use --mixed_precision bf16 or no")
    family.remember_text([], lambda: None)


def files_of(datasets: Sequence[TrainingDataset], weighted: bool, encoders: Encoders) -> list[TextFile]:
    """The files of all records, which their datasets are told.

    The name does not tell the caption; of records of one picture that differ there, the first has the file. The
    others' captions are encoded now, for memory.
    """
    files: dict[Path, TextFile] = {}
    crowded_out: dict[str, TextOutputs] = {}  # by caption
    for dataset in datasets:
        for index, repeats in enumerate(dataset.repeats):
            if not repeats:  # beyond the balance
                continue
            wanted = dataset.wanted_text(index, weighted)
            path = text_path(dataset.scanned.records[index].path)
            if files.setdefault(path, TextFile(path, wanted)).wanted.caption == wanted.caption:
                dataset.text_paths[index] = path
                continue
            if wanted.caption not in crowded_out:
                crowded_out[wanted.caption] = encoders.outputs(wanted.caption)
            dataset.texts[index] = crowded_out[wanted.caption]
    if crowded_out:
        logger.warning(
            "%d captions belong to pictures whose file of text encoder outputs is for another caption, as another "
            "picture of the same name or another subset has it; theirs stay in memory",
            len(crowded_out),
        )
    return list(files.values())


def reasons_to_make(files: list[TextFile], encoders: Encoders, accelerator: Accelerator) -> dict[TextFile, str]:
    """The files that cannot be used, and why."""
    shapes, reasons, sketches = encoders.shapes, {}, {}
    hidden = not accelerator.is_local_main_process
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        tqdm(total=len(files), desc="checking text encoder outputs", unit="files", disable=hidden, delay=1) as bar,
    ):
        for file, (reason, sketch) in zip(files, pool.map(lambda file: examine(file, shapes), files), strict=True):
            if reason:
                reasons[file] = reason
            else:
                sketches[file] = sketch
            bar.update()
    others = [file for file, sketch in sketches.items() if sketch is None]
    reasons |= {
        file: OTHER_ENCODERS for file, sketch in sketches.items() if sketch is not None and not encoders.made(sketch)
    }
    if not all(encoders.may_have_made(read_text(file.path), file.wanted.caption) for file in spread(others)):
        reasons |= dict.fromkeys(others, OTHER_ENCODERS)
    return reasons


def examine(file: TextFile, shapes: Shapes) -> tuple[str | None, np.ndarray | None]:
    """Why a file cannot be used, and the sketch of its encoders, which are still to be compared."""
    try:
        found, origin = examine_file(file.path)
        return misfit(file.path, found, origin, file.wanted, shapes), origin and origin.encoders
    except FileNotFoundError:
        return ABSENT, None
    except DAMAGED:
        return BROKEN, None


def write_files(files: list[TextFile], encoders: Encoders, accelerator: Accelerator) -> list[Path]:
    """Encode captions into their files; returns the paths for which the encoders made NaN, and no file."""
    broken = []
    hidden = not files or not accelerator.is_local_main_process
    with tqdm(total=len(files), desc="encoding captions", unit="captions", disable=hidden, delay=1) as bar:
        for file in files:
            outputs = encoders.outputs(file.wanted.caption)
            if all(np.isfinite(value).all() for value in outputs.values()):
                write_text(file.path, outputs, TextOrigin(file.wanted.fingerprint, encoders.sketch))
            else:
                broken.append(file.path)
            bar.update()
    return broken
