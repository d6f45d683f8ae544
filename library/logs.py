"""Messages: one line an event, to the console and where asked to a file; other libraries' chatter is held back."""

import logging
import os
import sys
import warnings
from pathlib import Path

from library.errors import UserError, one_line
from library.options.groups import LoggingOptions
from library.secrets import redacted

QUIET_LIBRARIES = (
    *("bitsandbytes", "diffusers", "transformers", "accelerate", "torch", "PIL", "matplotlib"),
    *("httpx", "httpx2", "huggingface_hub"),
)


class OneLine(logging.Formatter):
    """A message on one line, also where names in it have line ends or move the cursor; `has_lines` keeps its lines.

    No secrets are in it, nor in tracebacks where there are any.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  a method of logging's
        lines = record.message.split("\n") if getattr(record, "has_lines", False) else [record.message]
        record.message = "\n".join(map(one_line, lines))
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


FORMAT = OneLine("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


class LogFile(logging.FileHandler):
    """A log in a file, line by line; where it can no longer be written, the console takes its place."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(FORMAT)
        root = logging.getLogger()
        root.removeHandler(self)
        root.addHandler(console)
        root.warning(
            "--console_log_file: %s cannot be written, messages come here now: %s", self.baseFilename, error.strerror
        )
        console.handle(record)


def open_log(path: Path) -> LogFile:
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        return LogFile(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--console_log_file: {path} cannot be written: {error.strerror}") from error


def start_logging(options: LoggingOptions) -> None:
    """Set up the root logger as the options say; only the main process speaks below warnings."""
    level = getattr(logging, options.console_log_level or "INFO")
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    is_first = os.environ.get("RANK", "0") == "0"  # the one process that writes files
    if options.console_log_file and is_first:
        handler = open_log(Path(options.console_log_file))
    handler.setFormatter(FORMAT)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        level = max(level, logging.WARNING)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|accelerate|bitsandbytes|PIL)\b")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
