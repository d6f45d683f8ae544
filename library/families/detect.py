"""What a checkpoint is, read from its header alone: no torch, no weights, no code of a pickle run."""

import os
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, first_line
from library.families.kinds import KINDS, PIPELINE_KINDS, Shapes, kind_of_shapes
from library.safetensors_header import read_header
from library.texts import read_json

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
POINTER_START = b"version https://git-lfs"
MAX_PICKLE_BYTES = 20_000_000  # of the index of a torch file; large models have about 1 MB
SD2_TEXT_LAYERS = 23  # of the 24 in its files: it was trained with the output of the last but one


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a base model lies and which kind it is."""

    path: Path
    kind: str  # a key of KINDS
    is_folder: bool

    @property
    def description(self) -> str:
        return KINDS[self.kind].description


def inspect_checkpoint(path_text: str, flag: str = "--pretrained_model_name_or_path") -> CheckpointInfo:
    """The kind of the base model at the path; UserError where there is none."""
    path = Path(path_text)
    if os.path.isdir(path):
        return CheckpointInfo(path, _kind_of_folder(path, flag), is_folder=True)
    if not os.path.isfile(path):
        raise UserError(_missing_sentence(path_text, flag))
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise UserError(
            f"{flag}: {path} is not a checkpoint; give a .safetensors or .ckpt file or a diffusers model folder"
        )
    return CheckpointInfo(path, kind_of_shapes(read_shapes(path, flag)), is_folder=False)


def read_shapes(path: Path, flag: str) -> Shapes:
    """Weight names and shapes of a checkpoint file (shape None where a pickle does not tell)."""
    refuse_pointer(path, flag)
    if path.suffix.lower() == ".safetensors":
        return read_header(path, flag).shapes
    return dict.fromkeys(_names_in_pickle(path, flag))


def refuse_pointer(path: Path, flag: str) -> None:
    """UserError for the few lines that git leaves in place of a large file without git-lfs."""
    with open(path, "rb") as file:
        if file.read(len(POINTER_START)) == POINTER_START:
            raise UserError(
                f"{flag}: {path} is not the file itself but git-lfs's pointer to it: run `git lfs pull` in its "
                "folder, or download the file again"
            )


def _missing_sentence(path_text: str, flag: str) -> str:
    path = Path(path_text)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_text) and path.suffix.lower() not in WEIGHT_SUFFIXES:
        return (
            f"{flag}: there is no folder {path_text} here; nothing is downloaded, so if this is a name on the "
            "Hugging Face hub, download the model first and give the path of its folder or .safetensors file"
        )
    if not path.parent.is_dir():
        return f"{flag}: {path_text} does not exist (there is no folder {path.parent}); give the path of a checkpoint"
    neighbours = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in WEIGHT_SUFFIXES)[:5]
    found = f"; {path.parent} has {', '.join(neighbours)}" if neighbours else ""
    return f"{flag}: the file {path_text} does not exist{found}"


def _kind_of_folder(path: Path, flag: str) -> str:
    index_path = path / "model_index.json"
    if not index_path.is_file():
        raise UserError(f"{flag}: the folder {path} is not a diffusers model: it has no model_index.json")
    index = read_json_object(index_path, flag)
    for part in sorted(path.glob("*/*")):
        if part.suffix in WEIGHT_SUFFIXES and part.is_file():
            refuse_pointer(part, flag)
    kind = PIPELINE_KINDS.get(str(index.get("_class_name")), "unknown")
    if kind not in ("sd1", "sd1_inpainting", "sdxl"):
        return kind
    unet, text_encoder = (_read_json_if_there(path / part / "config.json", flag) for part in ("unet", "text_encoder"))
    takes_more = kind.endswith("_inpainting") or unet.get("in_channels", 4) != 4
    if kind == "sdxl":
        return "sdxl_inpainting" if takes_more else kind
    has_open_clip = unet.get("cross_attention_dim") == 1024 or text_encoder.get("hidden_act") == "gelu"
    return ("sd2" if has_open_clip else "sd1") + ("_inpainting" if takes_more else "")


def _read_json_if_there(path: Path, flag: str) -> dict:
    return read_json_object(path, flag) if path.is_file() else {}


def read_json_object(path: Path, flag: str) -> dict:
    """The object in a JSON file of a model folder."""
    try:
        return dict(read_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{flag}: {path} is broken; get the model again") from None


def is_zip(path: Path) -> bool:
    """Whether a file ends as a zip archive does."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an archive in several parts
        return False


def _names_in_pickle(path: Path, flag: str) -> list[str]:
    """The strings of a torch pickle's index; the pickle is only scanned, never run."""
    if not is_zip(path):
        raise UserError(
            f"{flag}: {path} is not a checkpoint that can be read safely (no torch zip archive, or cut off); "
            "get the .safetensors version of this model"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            index = [item for item in archive.infolist() if item.filename.endswith("data.pkl")]
            num_bytes = sum(item.file_size for item in archive.infolist())
            if index and index[0].file_size <= MAX_PICKLE_BYTES and num_bytes <= path.stat().st_size:
                operations = pickletools.genops(archive.read(index[0]))
                return [argument for _, argument, _ in operations if isinstance(argument, str)]
    except Exception as error:  # zipfile and pickletools raise many kinds on damaged files
        raise UserError(f"{flag}: {path} is broken ({first_line(error)}); get the file again") from None
    raise UserError(f"{flag}: {path} is a zip archive but no torch checkpoint, which torch would not have compressed")
