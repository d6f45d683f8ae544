"""Messages: one line an event, to the console and where asked to a file; other libraries' chatter is held back."""

import logging
import os
import sys
import warnings
from pathlib import Path

from library.errors import one_line
from library.options.groups import LoggingOptions

QUIET_LIBRARIES = (
    *("bitsandbytes", "diffusers", "transformers", "accelerate", "torch", "PIL", "matplotlib"),
    *("httpx", "httpx2", "huggingface_hub"),
)


class OneLine(logging.Formatter):
    """A message on one line, also where names in it have line ends or move the cursor; `has_lines` keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  a method of logging's
        lines = record.message.split("\n") if getattr(record, "has_lines", False) else [record.message]
        record.message = "\n".join(map(one_line, lines))
        return super().formatMessage(record)


def start_logging(options: LoggingOptions) -> None:
    """Set up the root logger as the options say; only the main process speaks below warnings."""
    level = getattr(logging, options.console_log_level or "INFO")
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if options.console_log_file:
        Path(options.console_log_file).absolute().parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
    handler.setFormatter(OneLine("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        level = max(level, logging.WARNING)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|accelerate|bitsandbytes|PIL)\b")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
