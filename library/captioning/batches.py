"""Pictures read in threads while a model works on those before them."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from library.dataset.picture_files import unreadable_reason
from library.parallel import ahead, threads

Read = TypeVar("Read")


def read_in_batches(
    pictures: list[Path],
    read: Callable[[Path], Read],
    batch_size: int,
    num_threads: int | None,
    damaged: list[str],
) -> Iterator[list[tuple[Path, Read]]]:
    """Batches of pictures with what was read of them; those that cannot be read go to `damaged`, with the reason."""

    def attempt(picture: Path) -> tuple[Path, Read | None, str]:
        try:
            return picture, read(picture), ""
        except Exception as error:  # Pillow's readers raise many kinds on damaged files
            return picture, None, unreadable_reason(picture, error)

    count = num_threads or min(8, os.cpu_count() or 1)
    with threads(count) as pool:
        results = ahead(pool, attempt, pictures, limit=count + 2 * batch_size)
        whole = _without_damaged(results, damaged)
        while batch := list(islice(whole, batch_size)):
            yield batch


def _without_damaged(
    results: Iterable[tuple[Path, Read | None, str]], damaged: list[str]
) -> Iterator[tuple[Path, Read]]:
    for picture, value, reason in results:
        if value is None:
            damaged.append(f"{picture} ({reason})")
        else:
            yield picture, value
