"""Ending a run when that is asked for: by Ctrl-C, SIGTERM, a console break, or a file STOP in the output folder."""

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from torch import distributed

from library.dataset.loader import STOP_SIGNALS
from library.errors import Stopped

logger = logging.getLogger(__name__)

CAUSES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGBREAK": "a console break"}
STOP_FILES = ("STOP", "STOP.txt")  # Windows likes to hide the ending of a new text file
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_OF_ONE_REQUEST = 1.0  # torchrun passes on a Ctrl-C that its processes have had from the terminal already
ANNOUNCEMENT = b"\nstopping: this step is finished and saved"
ONCE_MORE = b"; Ctrl-C once more ends at once, without saving\n"


def remove_old_request(folder: Path) -> None:
    """Remove a STOP file that is there before the run begins; it was meant for another."""
    for path in stop_files(folder):
        path.unlink(missing_ok=True)
        logger.warning("%s was there before this run began, and was removed: it stops a run that is training", path)


def stop_files(folder: Path) -> list[Path]:
    return [folder / name for name in STOP_FILES if (folder / name).is_file()]


class StopRequest:
    """Listens, while it is entered, for a request to stop; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder = folder
        self.looks = accelerator.is_main_process
        self.looked_at = self.asked_at = 0.0  # time.monotonic()
        self.cause: str | None = None
        self.handlers: dict[int, object] = {}  # as they were before
        self.group = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and `&` in a script mean it
                    self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.looks and (error is None or isinstance(error, Stopped)):
            for path in stop_files(self.folder):
                path.unlink(missing_ok=True)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, now = not self.asked_at, time.monotonic()
        if is_first:
            self.asked_at, self.cause = now, CAUSES[signal.Signals(number).name]
            with contextlib.suppress(OSError):
                more = b", as SIGTERM asks\n" if number == signal.SIGTERM else ONCE_MORE
                os.write(2, ANNOUNCEMENT + more)  # logging is not safe inside a handler
        elif number != signal.SIGTERM and (self.group is None or now - self.asked_at > SECONDS_OF_ONE_REQUEST):
            raise KeyboardInterrupt

    def asked(self) -> str | None:
        """What asks to stop, None to go on; asked after each step in every process, which all get the same answer.

        The processes' vote is a number on the CPU, so no device is waited for.
        """
        now = time.monotonic()
        if self.looks and now - self.looked_at >= SECONDS_BETWEEN_LOOKS:
            self.looked_at = now
            self.cause = next((f"the file {path}" for path in stop_files(self.folder)), self.cause)
        if self.group is None:
            return self.cause
        vote = torch.tensor(float(self.cause is not None))
        distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self.group)
        return (self.cause or "another process") if vote else None
