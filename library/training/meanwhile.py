"""Networks and states written while training goes on: their tensors are copied, and a thread writes the copies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.network_files import dtype_in_file, write_weights

CHUNK = 2**20  # numbers that are joined on the device at once


class Meanwhile:
    """One piece of work at a time in another thread; what follows it is done by who asks after it.

    So nothing is logged, and no other file touched, but between steps.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1)
        self._running: tuple[Future, Callable[[Future], None]] | None = None

    def begin(self, work: Callable[[], object], then: Callable[[Future], None]) -> None:
        """Begin work, after that which runs yet; `then` is called with its result."""
        self.finish()
        self._running = self._thread.submit(work), then

    def look(self) -> None:
        """Do what follows the work, where it is done."""
        if self._running and self._running[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the work and do what follows it."""
        if self._running:
            future, then = self._running
            wait([future])
            self._running = None
            then(future)


@dataclass(frozen=True)
class Writing:
    """A file or folder to be written from copies."""

    path: Path
    write: Callable[[], bool | None]  # False where there is nothing that is worth a file
    written: Callable[[], None]  # what follows, between steps


def write_in_order(writings: Sequence[Writing]) -> list[bool | None | Exception]:
    """What became of them; one that fails does not keep the next from being written, one of no worth does."""
    outcomes: list[bool | None | Exception] = []
    for writing in writings:
        try:
            outcomes.append(writing.write())
        except Exception as error:  # whatever it is: the run is worth more than this file
            outcomes.append(error)
        if outcomes[-1] is False:
            break
    return outcomes


class Copies:
    """Copies of tensors in the computer's memory, all in the same place, one after the other."""

    def __init__(self):
        self._buffers: dict[tuple, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The weights, cast to `dtype` where given; there as soon as `wait` returns, whatever changes them later.

        Programs that write files take parts of one buffer for one tensor, so each is in a storage of its own.
        """
        groups: dict[tuple[torch.device, torch.dtype, torch.dtype], dict[str, Tensor]] = {}
        for name, value in weights.items():
            wanted = dtype_in_file(name, dtype) or value.dtype
            groups.setdefault((value.device, value.dtype, wanted), {})[name] = value
        copies = {name: copy for key, group in groups.items() for name, copy in self._taken(key, group)}
        return {name: copies[name] for name in weights}

    def wait(self) -> None:
        """Wait until the device has copied."""
        if self._copied:
            self._copied.synchronize()

    def _taken(
        self, key: tuple[torch.device, torch.dtype, torch.dtype], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Few large copies, where those of single weights would take longer to begin than to make.

        `key` is their device, dtype, and the dtype of the copies.
        """
        is_cuda = key[0].type == "cuda"
        sizes = [value.numel() for value in weights.values()]
        if key not in self._buffers or len(self._buffers[key]) < sum(sizes):
            self._buffers[key] = torch.empty(sum(sizes), dtype=key[2], pin_memory=is_cuda)
        buffer, start = self._buffers[key], 0
        for chunk in chunks(list(weights.values())):
            joined = torch.cat([value.reshape(-1) for value in chunk])
            buffer[start : start + len(joined)].copy_(joined, non_blocking=is_cuda)
            start += len(joined)
        if is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        memory, start = buffer.view(torch.uint8).numpy(), 0
        for name, value in weights.items():
            stop = start + value.numel() * key[2].itemsize
            yield name, torch.from_numpy(memory[start:stop]).view(key[2]).view(value.shape)
            start = stop


def chunks(values: list[Tensor]) -> Iterator[list[Tensor]]:
    """The values in groups that each have CHUNK numbers, the last one fewer."""
    chunk, size = [], 0
    for value in values:
        chunk.append(value)
        size += value.numel()
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def write_copies(
    path: Path, copies: Copies, weights: dict[str, Tensor], metadata: Callable[[], dict[str, str]]
) -> bool:
    """Write weights that were taken; False, and no file, where some are no numbers. CannotWrite as `write_weights`."""
    copies.wait()
    if not all(value.isfinite().all() for value in weights.values()):
        return False
    write_weights(path, weights, None, metadata())  # which may wait for the base model's hash
    return True
