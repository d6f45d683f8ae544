"""What programs show of a network beside its name: a picture, and the words that call what was trained.

ComfyUI and the WebUI find the picture in the network's own metadata, the WebUI also finds NAME.json and
NAME.preview.png beside it. Needs no torch.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.adapters.covers import cover_image
from library.dataset.picture_files import open_picture
from library.errors import UserError
from library.files import read_user_text, write_text_whole
from library.generating.runs import Preview
from library.pictures import write_picture
from library.texts import read_json

logger = logging.getLogger(__name__)

AUTO = "auto"
COVER_KEY = "ssmd_cover_images"  # a JSON list of pictures in base64
MAX_WORDS = 8
COMMON = 0.9  # share of the captions that a trigger word is in
SD_VERSIONS = {"sd_v1": "SD1", "sd_v2": "SD2", "sdxl_": "SDXL"}  # by the start of ss_base_model_version


def chosen_cover(cover_image: str, previews: Sequence[Preview]) -> Path | None:
    """The picture that is named, or the first of the last previews; None where there are none."""
    if cover_image != AUTO:
        return Path(cover_image)
    last = [preview for preview in previews if preview.when == previews[-1].when]
    return min(last, key=lambda preview: preview.number).path if last else None


def cover_metadata(path: Path) -> dict[str, str]:
    """The metadata that holds a picture; hashes of a network are of other fields, and stay."""
    return {COVER_KEY: json.dumps([cover_image(path)])}


def trigger_words(metadata: dict[str, Any], phrase: str | None = None) -> str:
    """The phrase that is given, or the tags of nearly all captions, or the names of the folders."""
    if phrase:
        return phrase
    folders = json.loads(str(metadata.get("ss_tag_frequency") or "{}"))
    trained = json.loads(str(metadata.get("ss_dataset_dirs") or "{}"))
    words: list[str] = []
    for folder, counts in folders.items():
        num_pictures = trained.get(folder, {}).get("img_count", 0)
        if num_pictures:
            words += [tag.strip() for tag, count in counts.items() if count >= COMMON * num_pictures]
    words = list(dict.fromkeys(word for word in words if word))[:MAX_WORDS]
    if not words:
        named = (folder.partition("_") for folder in trained)
        words = list(dict.fromkeys(name.strip() for number, _, name in named if number.isdigit() and name.strip()))
    return ", ".join(words)


def write_card(network: Path, cover: Path | None, metadata: dict[str, Any], words: str, description: str) -> None:
    """Write NAME.preview.png and NAME.json beside a network; what a user has written into the latter stays."""
    if cover:
        with open_picture(cover) as picture:
            write_picture(network.with_suffix(".preview.png"), picture.convert("RGB"))
    path = network.with_suffix(".json")
    version = str(metadata.get("ss_base_model_version", ""))
    card = {
        "description": description,
        "sd version": next((name for start, name in SD_VERSIONS.items() if version.startswith(start)), "Unknown"),
        "activation text": words,
        "preferred weight": 0,
        "negative text": "",
        "notes": "",
    }
    try:
        there = read_json(read_user_text(path, str(path))) if path.is_file() else {}
    except (UserError, ValueError):
        there = None
    if not isinstance(there, dict):
        logger.warning("%s is left as it is: it is no card of the WebUI", path)
        return
    card |= {name: value for name, value in there.items() if value not in ("", 0)}
    write_text_whole(path, json.dumps(card, ensure_ascii=False, indent=1))
