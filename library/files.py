"""Files that are either whole or absent, as everything a run writes appears by rename; and texts that users wrote."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import UserError
from library.texts import decoded


@contextmanager
def written_whole(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    `durable` waits until the disk has the data; what can be made again, such as a cache, need not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            _flush_to_disk(temporary)
        _give_usual_permissions(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_user_text(path: Path, place: str) -> str:
    """The text of a file in UTF-8; a UserError begins with `place`, which names the file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{place} is not a file")  # to read a pipe would be to wait
    try:
        return decoded(path.read_bytes(), place)
    except FileNotFoundError as error:
        raise UserError(f"{place} does not exist") from error
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}") from error


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _give_usual_permissions(path: Path) -> None:
    """mkstemp makes private files; give them what open() would have given."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
