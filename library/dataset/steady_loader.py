"""A DataLoader that goes on where it can: lost worker processes are replaced, pictures left out are named."""

import itertools
import logging
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from library.dataset.sampler import Draw
from library.errors import UserError, counted, quoted_list
from library.families.base import Batch

logger = logging.getLogger(__name__)

LOST_WORKER = r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)"  # how PyTorch says it
MAX_LOST_WORKERS = 2  # after these, pictures are read in the process that trains
ALWAYS_ALLOWED = 3  # pictures that may become unreadable in a run, and
ALLOWED_SHARE = 0.1  # of all pictures, if that is more


class SteadyLoader(DataLoader):
    """Batches depend on their draws alone, so those of a new worker are those of the lost one."""

    def __init__(self, dataset: Any, batches: Iterable[list[Draw]], **settings: Any):
        self.place = FromPlace(batches)
        super().__init__(dataset, batch_sampler=self.place, **settings)
        self.num_lost = 0
        self.left_out: dict[str, None] = {}

    def __iter__(self) -> Iterator[Batch]:
        self.place.start = num_given = 0
        while True:
            try:
                with undisturbed():
                    batches = super().__iter__()
                for batch in batches:
                    self._name_left_out(batch.left_out)
                    num_given += 1
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self.num_workers or not tells_of_a_lost_worker(error):
                    raise
                self._replace_workers()
                self.place.start = num_given

    def _replace_workers(self) -> None:
        self.num_lost += 1
        self._iterator = None  # that of persistent workers
        if self.num_lost > MAX_LOST_WORKERS:
            self.num_workers = 0
        logger.warning(
            "a process that reads pictures was ended from outside, most likely for lack of memory; training goes on "
            "with %s; --max_data_loader_n_workers 0 needs the least memory",
            "new ones" if self.num_workers else "no such processes",
        )

    def _name_left_out(self, pictures: list[str]) -> None:
        """Warn of each once; UserError where there are too many."""
        for picture in pictures:
            if picture not in self.left_out:
                self.left_out[picture] = None
                logger.warning("left out of its batches from now on: %s", picture)
        if len(self.left_out) > max(ALWAYS_ALLOWED, ALLOWED_SHARE * len(self.dataset.repeats)):
            raise UserError(
                f"{counted(len(self.left_out), 'picture')} can no longer be read, so training does not go on without "
                f"them: {quoted_list(list(self.left_out))}"
            )


class FromPlace:
    """Batches of draws without the first `start` ones."""

    def __init__(self, batches: Iterable[list[Draw]]):
        self.batches = batches
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        return itertools.islice(self.batches, self.start, None)


def tells_of_a_lost_worker(error: Exception) -> bool:
    """Whether a worker has ended, silently or while it handed over a batch; its own errors begin with "Caught"."""
    is_cut_off = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and "Caught " not in str(error)
    return is_cut_off or re.search(LOST_WORKER, str(error)) is not None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the signal that tells of ended child processes to whom it belonged before.

    PyTorch takes it with the first worker, and then raises a worker's death wherever the training step is just then,
    in the middle of an update too; without it, death is noticed where the next batch is waited for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)
