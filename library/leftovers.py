"""What killed runs left behind in a folder: unfinished files go, and a state that was about to be replaced is back."""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from library.files import MACHINE

logger = logging.getLogger(__name__)

TEMPORARY = re.compile(  # as library.files.temporary_beside makes them
    r"\..*-(?P<machine>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<ending>tmp|old)(\..*)?", re.DOTALL
)
SECONDS_TO_WRITE = 3600  # no file takes longer; those of other machines that are older have lost their writer


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Clear folders of what processes that no longer run have not finished; others' files are left alone."""
    for folder in dict.fromkeys(folders):
        with suppress(OSError):  # no such folder, or not ours to write
            for name in os.listdir(folder):
                match = TEMPORARY.fullmatch(name)
                if match and not is_in_use(folder / name, match["machine"], int(match["pid"])):
                    _clear(folder / name, match["ending"] == "old")


def is_in_use(path: Path, machine: str, pid: int) -> bool:
    if machine != MACHINE:
        return max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > time.time() - SECONDS_TO_WRITE
    return pid != os.getpid() and is_running(pid)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of this number that has not ended."""
    import psutil  # seldom needed, and not for --help

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _clear(path: Path, was_set_aside: bool) -> None:
    if was_set_aside:
        for folder in path.iterdir():
            home = path.parent / folder.name
            if not home.exists():
                os.rename(folder, home)
                logger.warning("%s is back: the run that was about to replace it was killed", home)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
