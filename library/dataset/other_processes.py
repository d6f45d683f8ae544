"""Files of a large folder, looked at by more than one process: an interpreter uses one core.

Threads are no help, as the calls are so short that handing the interpreter over costs more than they take. Run as a
script, this file is the other process; it imports next to nothing, so that it is there at once.
"""

import os
import subprocess
import sys
from array import array
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

WORTH_IT = 20_000  # files; a process takes as long to start as it takes to look at 10,000
MAX_PROCESSES = 4
MAX_BYTES = 8192  # of a file that is read there, or remembered in an index
GONE = -1
ENCODING = "utf-8", "surrogateescape"  # of names on their way


def statuses(names: Iterable[str], folder: int) -> array:
    """The bytes and the time of change in ns of files, by turns; twice GONE for those that are not there."""
    stat, found = os.stat, []
    for name in names:
        try:
            status = stat(name, dir_fd=folder)
        except OSError:
            found += (GONE, GONE)
        else:
            found += (status.st_size, status.st_mtime_ns)
    return array("q", found)


def contents(names: Iterable[str], folder: int) -> tuple[array, bytes]:
    """What `statuses` says, and the bytes of files, NUL between them.

    GONE and nothing of those that have NUL in them or more than MAX_BYTES.
    """
    found, read = [], []
    for name in names:
        size, time, content = GONE, GONE, b""
        with suppress(OSError):
            handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            try:
                status = os.fstat(handle)
                content = os.read(handle, MAX_BYTES + 1) if status.st_size <= MAX_BYTES else b""
                if len(content) == status.st_size and b"\0" not in content:
                    size, time = status.st_size, status.st_mtime_ns
            finally:
                os.close(handle)
        found += (size, time)
        read.append(content if size != GONE else b"")
    return array("q", found), b"\0".join(read)


class OtherProcess:
    """Looks at files of a folder, and reads them if asked to, from now on and until it is asked for what it found."""

    def __init__(self, folder: str, names: list[str], reads: bool = False):
        self._names, self._process = names, None
        with suppress(OSError):
            command = [sys.executable, "-I", "-S", __file__, "contents" if reads else "statuses", folder]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            with self._process.stdin as its_input:
                its_input.write("\0".join(names).encode(*ENCODING))

    def found(self) -> tuple[array, bytes] | None:
        """As from `contents`, without contents if it only looked; None where that failed."""
        if self._process is None:
            return None
        with self._process:
            answer = memoryview(self._process.stdout.read())
        head = 16 * len(self._names)
        if self._process.returncode or len(answer) < head:
            return None
        return array("q", answer[:head].tobytes()), answer[head:].tobytes()


def num_processes(names: list[str]) -> int:
    """How many processes look at files together; on Windows one, which is told their status with their names."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_cores, MAX_PROCESSES) if len(names) >= WORTH_IT and os.stat in os.supports_dir_fd else 1


def shares(names: list[str], more_work: float) -> list[list[str]]:
    """The names of the files that each process looks at; the first one has more work, as if of so many files."""
    count, num = num_processes(names), len(names)
    first = max(0, int((num + more_work) / count - more_work)) if count > 1 else num
    ends = [first + (num - first) * place // (count - 1) for place in range(count)] if count > 1 else [num]
    return [names[start:end] for start, end in pairwise([0, *ends])]


def main(task: str, path: str) -> None:
    names = sys.stdin.buffer.read().decode(*ENCODING).split("\0")
    folder = os.open(path, os.O_RDONLY)
    found, read = contents(names, folder) if task == "contents" else (statuses(names, folder), b"")
    sys.stdout.buffer.write(found.tobytes() + read)


if __name__ == "__main__":
    main(*sys.argv[1:])
