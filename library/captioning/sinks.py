"""Where captions go, and which pictures have theirs already: files beside the pictures, or one metadata file."""

import time
from functools import cached_property
from pathlib import Path
from typing import Protocol

from library.captioning.listing import caption_path, read_captions
from library.captioning.metadata import read_metadata, write_metadata
from library.dataset.config import Size
from library.files import write_text_whole

SECONDS_BETWEEN_WRITES = 60  # what a power cut may cost of a metadata file


class Sink(Protocol):
    """Takes the captions of pictures."""

    def has(self, picture: Path) -> bool: ...

    def read(self, picture: Path) -> str: ...  # "" where there is none

    def write(self, picture: Path, text: str, size_wh: Size) -> None: ...

    def close(self) -> None: ...


class CaptionFiles:
    """A text file beside each picture."""

    def __init__(self, extension: str, pictures: list[Path]):
        self.extension, self.pictures = extension, pictures

    @cached_property
    def _texts(self) -> dict[Path, str]:
        """The captions that were there at first, read together: they tell each other's encoding."""
        return read_captions(caption_path(picture, self.extension) for picture in self.pictures if self.has(picture))

    def has(self, picture: Path) -> bool:
        return caption_path(picture, self.extension).is_file()

    def read(self, picture: Path) -> str:
        return self._texts.get(caption_path(picture, self.extension), "")

    def write(self, picture: Path, text: str, size_wh: Size) -> None:
        write_text_whole(caption_path(picture, self.extension), f"{text}\n")

    def close(self) -> None:
        """Everything is written."""


class MetadataFile:
    """The key `tags` of one metadata file, written once a minute, and when all is done or something ends the script."""

    def __init__(self, path: Path, root: Path):
        self.path = path
        self.metadata = read_metadata(path if path.is_file() else None, root, full_path=True)
        self._written_at = time.monotonic()

    def has(self, picture: Path) -> bool:
        return bool(self.read(picture))

    def read(self, picture: Path) -> str:
        return self.metadata.entries.get(self.metadata.key_of(picture), {}).get("tags") or ""

    def write(self, picture: Path, text: str, size_wh: Size) -> None:
        self.metadata.entry_of(picture).update(tags=text, image_size=list(size_wh))
        if time.monotonic() >= self._written_at + SECONDS_BETWEEN_WRITES:
            self.close()

    def close(self) -> None:
        if self.metadata.entries:
            write_metadata(self.path, self.metadata.entries)
        self._written_at = time.monotonic()
