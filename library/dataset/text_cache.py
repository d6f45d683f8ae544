"""Text encoder outputs on disk: kohya's file name and keys, and keys of our own for their origin.

As with latents, kohya may replace its own keys in a file of ours; so the origin holds a checksum, of the pooled text,
which comes out of all layers. The hidden states, most of a file, are not read to examine it.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.dataset.array_files import DAMAGED, KnownArrays, open_arrays, read_arrays, write_arrays
from library.errors import UserError

KEYS = ("hidden_state1", "hidden_state2", "pool2")

# Why outputs are made, as the line that counts them says it; besides those of library.dataset.cache_check.
OTHER_LENGTH = "of another length"
OTHER_CAPTION = "of another caption"
OUTDATED = "older than the caption or the picture"
OTHER_ENCODERS = "made with other text encoders"

TextOutputs = dict[str, np.ndarray]  # of one caption, by KEYS: [L, D1], [L, D2] and [P]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WantedText:
    """What the text encoder outputs of one picture must be of."""

    caption: str  # as it is encoded
    weighted: bool  # whether weights in it count
    is_whole_caption: bool  # whether nothing was put to the caption or taken from it, as kohya's files want it
    picture: Path | None  # None where it is gone
    caption_path: Path  # where the caption is, if anywhere

    @property
    def fingerprint(self) -> str:
        text = f"{'weighted' if self.weighted else 'plain'} {self.caption}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class TextOrigin:
    """What outputs were made from."""

    caption: str  # a WantedText's fingerprint
    encoders: np.ndarray  # [D] float32, what the encoders make of a test sentence


def text_path(image_path: Path) -> Path:
    """Where the text encoder outputs of a picture lie."""
    return image_path.with_name(f"{image_path.stem}_te_outputs.npz")


def read_text(path: Path, known: KnownArrays | None = None) -> TextOutputs:
    """The outputs of one file; a UserError where it is missing or damaged.

    `known`, which is of KEYS, is for files that are read again and again.
    """
    try:
        arrays = known.read(path) if known else read_arrays(path, KEYS)
        return {key: arrays[key] for key in KEYS}
    except DAMAGED as error:
        raise UserError(
            f"text encoder outputs {path} cannot be read ({error}); delete the file and train again"
        ) from error


def write_text(path: Path, outputs: TextOutputs, origin: TextOrigin) -> None:
    """Write one file by way of a temporary one, so that a killed run leaves no half of it."""
    arrays = {key: outputs[key].astype(np.float32) for key in KEYS} | {
        "athanor_caption": np.array(origin.caption),
        "athanor_encoders": origin.encoders.astype(np.float32),
    }
    arrays["athanor_checksum"] = np.array(zlib.crc32(arrays["pool2"]))
    write_arrays(path, arrays, "text encoder outputs", "cache_text_encoder_outputs")


def examine_file(path: Path) -> tuple[Shapes, TextOrigin | None]:
    """The shapes of the outputs, and what they were made from; raises one of DAMAGED where the file is."""
    with open_arrays(path) as file:
        shapes = {key: _shape(file, key) for key in KEYS}
        if "athanor_checksum" not in file or file["athanor_checksum"] != zlib.crc32(
            np.ascontiguousarray(file["pool2"])
        ):
            return shapes, None
        return shapes, TextOrigin(str(file["athanor_caption"]), file["athanor_encoders"])


def misfit(path: Path, shapes: Shapes, origin: TextOrigin | None, wanted: WantedText, right: Shapes) -> str | None:
    """Why outputs cannot be used, encoders apart.

    Those without an origin, as kohya's are, are taken for a caption as its file has it, if they are not older than it
    and the picture.
    """
    if shapes["hidden_state1"][:1] != right["hidden_state1"][:1]:
        return OTHER_LENGTH
    if shapes != right:
        return OTHER_ENCODERS
    if origin:
        return None if origin.caption == wanted.fingerprint else OTHER_CAPTION
    if wanted.weighted or not wanted.is_whole_caption:
        return OTHER_CAPTION
    sources = [source for source in (wanted.picture, wanted.caption_path) if source and source.is_file()]
    written = path.stat().st_mtime_ns
    return OUTDATED if any(written < source.stat().st_mtime_ns for source in sources) else None


def _shape(file: np.lib.npyio.NpzFile, key: str) -> tuple[int, ...]:
    """The shape of an array that is not read."""
    with file.zip.open(f"{key}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype.kind != "f":
        raise ValueError(f"{key} is {dtype}")
    return shape
