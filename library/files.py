"""Files that are either whole or absent, as everything a run writes appears by rename; and texts that users wrote."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from library.errors import CannotWrite, UserError
from library.texts import decoded

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP)  # by file systems that cannot flush
# How torch and safetensors tell of a failed write, which they do without an OSError.
FAILED_WRITES = re.compile(r"inline_container|PytorchStreamWriter|I/O error: (?P<reason>.+?) \(os error")
WAITS = 20  # of a tenth of a second, for another program to let go of a file


def _machine() -> str:
    """What tells this computer, or this container, from others that write to the same folder."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # Linux: containers may share a host's name
    except OSError:
        processes = ""
    return hashlib.blake2b(f"{socket.gethostname()} {processes}".encode(), digest_size=3).hexdigest()


MACHINE = _machine()


def temporary_beside(path: Path, ending: str = "tmp") -> Path:
    """A hidden name beside `path` that says who is writing, so that `library.leftovers` knows what was left behind."""
    writer = f"{MACHINE}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.stem[:40]}-{writer}.{ending}{path.suffix[:12]}")


@contextmanager
def written_whole(path: Path, durable: bool = True, num_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    The disk has the data before the file has its name, and `durable` waits until it has the name too; what can be made
    again, such as a cache, need not. CannotWrite, with what `num_bytes` the file would need, where writing fails.
    """
    temporary = temporary_beside(path)
    with failed_writes_told(path, num_bytes):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush_to_disk(temporary)
            try:
                rename(temporary, path)
            except PermissionError:
                if durable and path.is_file():
                    raise _kept(temporary, path) from None
                raise
            if durable:
                flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes_whole(path: Path, data: bytes | memoryview, durable: bool = True) -> None:
    with written_whole(path, durable, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text_whole(path: Path, text: str) -> None:
    """Write UTF-8 text with LF line ends."""
    write_bytes_whole(path, text.encode())


@contextmanager
def failed_writes_told(path: Path, num_bytes: int | None = None, unfinished: Path | None = None) -> Iterator[None]:
    """Raise CannotWrite for `path` where writing fails inside the block, whatever library tells of it.

    It says what is free without `unfinished`, a folder that is to be removed.
    """
    try:
        yield
    except CannotWrite as error:
        raise CannotWrite(path, error.strerror, error.kept) from error
    except Exception as error:
        is_told, reason, is_full = _failure(error)
        if not is_told:
            raise
        raise CannotWrite(path, f"{reason} ({_room(path, num_bytes, unfinished)})" if is_full else reason) from error


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, gone after the block."""
    folder = temporary_beside(path)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_folder_in_place(new: Path, folder: Path) -> None:
    """Give a folder whose files are written its name; one that has the name already is whole until then, or set aside.

    In a run that is killed between the two renames, `library.leftovers` puts the older one back.
    """
    for path in (*new.rglob("*"), new):
        flush_to_disk(path)
    if not folder.exists():
        rename(new, folder)
        flush_to_disk(folder.parent)
        return
    aside = temporary_beside(folder, "old")
    aside.mkdir()
    rename(folder, aside / folder.name)
    try:
        rename(new, folder)
    except OSError:
        rename(aside / folder.name, folder)
        aside.rmdir()
        raise
    flush_to_disk(folder.parent)
    with suppress(OSError):  # what stays is a leftover
        remove_folder(aside)


def remove_folder(folder: Path) -> None:
    """Remove a folder that nobody sees half removed."""
    doomed = temporary_beside(folder)
    rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rename(old: Path, new: Path) -> None:
    """Rename over what is there; Windows refuses while another program has it open, so wait a little for that."""
    for _ in range(WAITS):
        try:
            os.replace(old, new)
            return
        except PermissionError:
            time.sleep(0.1)
    os.replace(old, new)


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file's data, or a folder's names, which Windows does not offer."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(handle)


def existing_part(path: Path) -> Path | None:
    """The path, or the nearest folder above it that is there; None where even the drive is not."""
    return next((part for part in (path, *path.absolute().parents) if part.exists()), None)


def why_not_writable(folder: str | Path) -> str | None:
    """Why no file can be made in a folder that is there, which is tried; None where one can."""
    probe = temporary_beside(Path(folder) / "probe")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


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


def _kept(temporary: Path, path: Path) -> CannotWrite:
    """Keep a new file that cannot have its name."""
    kept = path.with_name(f"{path.stem}-new{path.suffix}")
    os.replace(temporary, kept)
    return CannotWrite(path, f"another program has it open, or it is protected; the new file is {kept}", kept)


def _failure(error: Exception) -> tuple[bool, str, bool]:
    """Whether an error is of writing, why it failed, and whether for want of room."""
    if isinstance(error, OSError):
        return True, error.strerror or str(error), error.errno in NO_ROOM
    found = FAILED_WRITES.search(str(error))
    return bool(found), (found and found["reason"]) or "writing failed", True


def _room(path: Path, num_bytes: int | None, unfinished: Path | None) -> str:
    """What a file or folder would need and what its disk has without it."""
    free = shutil.disk_usage(existing_part(path.parent)).free
    if unfinished:
        free += sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    needed = "" if num_bytes is None else f"{num_bytes / 1e6:.2f} MB needed, "
    return f"{needed}{free / 1e6:.2f} MB free"
