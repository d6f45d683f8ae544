"""How processes share a batch. Needs no torch."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Share:
    """The rows that one process takes of a global batch."""

    seed: int  # of everything random about the global batch
    size: int  # rows of the global batch
    first: int
    stop: int  # behind the last
    weight: float  # of their mean, with which the mean over processes is that over the global batch

    @property
    def is_whole(self) -> bool:
        return self.stop - self.first == self.size

    def with_rows(self, count: int) -> "Share":
        """The same share where only this many of its rows could be read; their mean counts as that of all."""
        if self.is_whole:
            return replace(self, size=count, stop=count)
        return replace(self, stop=self.first + count)


def share_of(rank: int, num_processes: int, size: int, seed: int) -> Share:
    """The rows of one process, as even a part as there is; where there is none, a row that does not count."""
    first, stop = (-(-size * part // num_processes) for part in (rank, rank + 1))
    weight = (stop - first) * num_processes / size
    first = min(first, size - 1)
    return Share(seed, size, first, max(stop, first + 1), weight)
