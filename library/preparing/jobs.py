"""Making a folder of results from a folder of pictures: checked first, in threads, and again where it was stopped."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from library.dataset.folder import as_compared
from library.dataset.scan import unreadable_pictures
from library.errors import UserError, counted, quoted_list
from library.files import write_text_whole, written_whole
from library.folders import check_writable
from library.leftovers import remove_leftovers
from library.parallel import ahead, threads
from library.preparing.picture_io import Unreadable
from library.preparing.sources import Source

logger = logging.getLogger(__name__)

MAX_THREADS = 4  # each has a whole picture in memory
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One picture, and the files that it becomes."""

    source: Source
    targets: tuple[Path, ...]


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What came of jobs."""

    results: list[tuple[Job, Result]]
    unreadable: list[str]  # pictures, with reasons


def jobs_left(jobs: list[Job], folder: Path, label: str, settings: dict[str, Any], overwrite: bool) -> list[Job]:
    """The jobs that are still to be done, when everything is in order; a UserError says what is not.

    What is in `folder` counts as done where it was made with the same settings and after its picture changed. The
    settings are kept in the folder in a hidden file, which `overwrite` writes anew: what is older does not count.
    """
    if problems := _doubled(jobs, label):
        raise UserError(*problems)
    there = [target for job in jobs for target in job.targets if target.exists()]
    mark = claim_folder(folder, label, settings, there, overwrite)
    remove_leftovers({target.parent for job in jobs for target in job.targets})
    left = [job for job in jobs if not _is_done(job, mark)]
    if len(left) < len(jobs):
        logger.info("%s of %d are there already (--overwrite makes them again)", len(jobs) - len(left), len(jobs))
    return left


def claim_folder(folder: Path, label: str, settings: dict[str, Any], there: list[Path], overwrite: bool) -> Path:
    """The file in a folder that says with what settings its files were made, written where it is not these.

    A UserError where the folder takes no files, or where files are `there` that are not of these settings.
    """
    name = label.removeprefix("--")
    if problems := check_writable(name, str(folder)):
        raise UserError(*(problem.replace(f"--{name}", label, 1) for problem in problems))
    mark = folder / f".athanor_{settings['script']}.json"
    kept = None
    with suppress(OSError, ValueError):
        kept = json.loads(mark.read_text(encoding="utf-8"))
    if there and kept != settings and not overwrite:
        names = quoted_list([path.name for path in there], limit=3)
        why = "was made with other settings" if kept else f"has files that are not of this script ({names})"
        raise UserError(f"{label}: {folder} {why}; give another folder, or --overwrite to replace them")
    if overwrite or kept != settings:
        write_text_whole(mark, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
    return mark


def run_jobs(jobs: list[Job], make: Callable[[Job], Result], what: str, num_threads: int | None = None) -> Done[Result]:
    """Do the jobs in threads under a progress bar; pictures that are damaged are left out and named."""

    def attempt(job: Job) -> Result | Unreadable:
        try:
            return make(job)
        except Unreadable as error:
            return error

    num_threads = num_threads or min(MAX_THREADS, os.cpu_count() or 1)
    done: Done[Result] = Done([], [])
    with threads(num_threads) as pool:
        results = ahead(pool, attempt, jobs, limit=2 * num_threads)
        for job, result in zip(jobs, tqdm(results, what, len(jobs), unit="pictures"), strict=True):
            if isinstance(result, Unreadable):
                done.unreadable.append(str(result))
            else:
                done.results.append((job, result))
    return done


def finish(done: Done[Any], folder: Path) -> None:
    """Say how many pictures were made; a UserError names the damaged ones, which are not among them."""
    logger.info("%s made in %s", counted(len(done.results), "picture"), folder)
    if done.unreadable:
        raise UserError(unreadable_pictures(done.unreadable))


def copy_companions(job: Job) -> None:
    """Copy the files that belong to a picture beside what it became, under its new name."""
    for name in job.source.companions:
        for target in job.targets:
            copy_file(job.source.path.with_name(name), target.with_suffix(Path(name).suffix))


def copy_file(source: Path, target: Path) -> None:
    """A copy that is whole or absent."""
    with written_whole(target, durable=False) as temporary:
        shutil.copyfile(source, temporary)


def _doubled(jobs: Iterable[Job], label: str) -> list[str]:
    first: dict[str, Source] = {}
    problems = []
    for job in jobs:
        for target in job.targets:
            other = first.setdefault(as_compared(str(target)), job.source)
            if other is not job.source:
                both = f"{other.inside} and {job.source.inside}"
                problems.append(f"{label}: {both} would both become {target.name}; rename one")
    return problems


def _is_done(job: Job, mark: Path) -> bool:
    """Whether all results of a job are there, and newer than its picture and the settings."""
    with suppress(OSError):
        newest = max(path.stat().st_mtime_ns for path in (job.source.path, mark))
        return all(target.stat().st_mtime_ns >= newest for target in job.targets)
    return False
