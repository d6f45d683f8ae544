"""The hashes that a network file tells of its base model and VAE, found in the background and remembered."""

import hashlib
import logging
import os
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from library.options.groups import ModelOptions
from library.user_cache import remember, remembered

logger = logging.getLogger(__name__)

TABLE = "model_hashes.json"

Fields = dict[str, object]


class ModelHashes:
    """Names and hashes of the base model and of a separate VAE, as metadata fields.

    To read a large model takes seconds, from a slow disk a minute, and nobody needs its hash before the first save.
    """

    def __init__(self, options: ModelOptions):
        paths = {"sd_model": options.pretrained_model_name_or_path, "vae": options.vae}
        self._paths = {kind: path for kind, path in paths.items() if path}
        self._found: Future[Fields] | None = None

    def start(self) -> None:
        """Begin to hash, in a thread that does not keep the process alive."""
        self._found = Future()
        Thread(target=self._run, args=(self._found,), name="model hashes", daemon=True).start()

    def fields(self) -> Fields:
        """All of them, as soon as they are known."""
        return self._found.result() if self._found else self._compute()

    def fields_by_now(self) -> Fields:
        """All of them, or none where they are still being found."""
        return self._found.result() if self._found and self._found.done() else {}

    def _run(self, found: Future[Fields]) -> None:
        try:
            found.set_result(self._compute())
        except BaseException as error:
            found.set_exception(error)

    def _compute(self) -> Fields:
        return {name: value for kind, path in self._paths.items() for name, value in model_hashes(path, kind).items()}


def model_hashes(path_text: str, kind: str) -> Fields:
    """The fields of one model; without hashes, and with a warning, where it can no longer be read."""
    names = f"ss_{kind}_hash", f"ss_new_{kind}_hash"
    fields: Fields = {f"ss_{kind}_name": os.path.basename(os.path.normpath(path_text))}
    path = Path(path_text)
    if path.is_dir():
        return fields | dict.fromkeys(names, "IsADirectory")
    try:
        return fields | dict(zip(names, remembered_hashes(path), strict=True))
    except OSError as error:
        logger.warning("the metadata is without the hash of %s, which cannot be read: %s", path, error.strerror)
        return fields


def remembered_hashes(path: Path) -> tuple[str, str]:
    """The hashes of a file, which is read again where its size, time of change or inode are others than last time."""
    key, marks = os.path.abspath(path), _marks(path)
    match remembered(TABLE).get(key):
        case {"file": known, "window": str(window), "sha256": str(whole)} if known == marks:
            return window, whole
    window, whole = file_hashes(path)
    if _marks(path) == marks:
        remember(TABLE, key, {"file": marks, "window": window, "sha256": whole})
    return window, whole


def _marks(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def file_hashes(path: Path) -> tuple[str, str]:
    """The two hashes WebUI knows a model by: eight digits of a 64 KiB window, and the sha256 of the file."""
    whole = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(1 << 22))
        while size := file.readinto(block):
            whole.update(block[:size])
        file.seek(0x100000)
        window = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return window, whole.hexdigest()
