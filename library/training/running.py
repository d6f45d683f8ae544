"""Whether the names of a run's files are free: of folders, and of another run that is at work. Needs no torch."""

import os
from typing import Any

from library.errors import UserError
from library.files import MACHINE
from library.leftovers import is_running
from library.options.groups import SavingOptions
from library.texts import read_json
from library.training.saving import OutputNames

SECONDS_OF_CLOCKS = 10  # that the begin of a process may seem to move when the clock is set right


def check_place(options: SavingOptions) -> None:
    """UserError where a folder has the name of the file that a run ends with."""
    final = OutputNames(options).final()
    if final.is_dir():
        raise UserError(f"--output_name: {final}, where the network is to be written, is a folder; give another name")


def mark_of(pid: int) -> dict[str, Any]:
    """What tells a process from all others, also from a later one of the same number."""
    import psutil  # seldom needed, and not for --help

    return {"machine": MACHINE, "pid": pid, "began": psutil.Process(pid).create_time()}


def check_not_running(options: SavingOptions) -> None:
    """UserError where the run whose record has this name is still at work, in another process of this machine.

    A run writes its record when training begins; two that are started at once are not told from each other.
    """
    names = OutputNames(options)
    try:
        record = read_json(names.record().read_text(encoding="utf-8"))
        if not is_at_work(record["process"]):
            return
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return  # no record, none of ours, or of a run that has ended
    raise UserError(
        f"--output_dir: a run is at work on files of the same name in {names.folder}: process "
        f"{record['process']['pid']}, since {record.get('started')}; wait for it, stop it by a file "
        f"{names.folder / 'STOP'}, or give another --output_name"
    )


def is_at_work(mark: dict[str, Any]) -> bool:
    """Whether the process of a mark is on this machine, is another than this one, and has not ended."""
    import psutil

    machine, pid, began = mark["machine"], int(mark["pid"]), float(mark["began"])
    if machine != MACHINE or pid == os.getpid() or not is_running(pid):
        return False
    try:
        return abs(mark_of(pid)["began"] - began) < SECONDS_OF_CLOCKS
    except psutil.Error:
        return False
