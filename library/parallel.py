"""Work in threads that stays in order: done ahead of its use, or behind its making. Needs no torch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, where the block ends early, finish what they are at and begin nothing more."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], limit: int
) -> Iterator[Result]:
    """The results for the items in their order, up to `limit` of them before they are asked for.

    An error is raised where its result would have been.
    """
    running: deque[Future[Result]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= limit:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


@contextmanager
def finished_behind(limit: int) -> Iterator[Callable[..., None]]:
    """Gives a function that has calls made in one other thread, in order, while up to `limit` of them wait.

    The error of one is raised at one of the next, or at the end of the block. All are made, also where it ends early.
    """
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def begin(function: Callable[..., None], *arguments: Any) -> None:
            if len(waiting) >= limit:
                waiting.popleft().result()
            waiting.append(thread.submit(function, *arguments))

        yield begin
        for future in waiting:
            future.result()
