"""The files of pictures: their names, and the text in them. Needs no torch."""

import io
import re
import time
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.files import write_bytes_whole
from library.generating.options import OutputFlags
from library.generating.requests import PictureRequest


class OutputNames:
    """The names of a run's pictures, as kohya gives them; a file that is there is never written over."""

    def __init__(self, options: OutputFlags, is_highres: bool):
        self.options, self.folder, self.is_highres = options, Path(options.outdir), is_highres
        numbers = (re.fullmatch(r"im_(\d{6})\.png", path.name) for path in _files(self.folder))
        self.last_number = max((int(match[1]) for match in numbers if match), default=0)

    def of(self, request: PictureRequest, number: int, is_first_stage: bool = False) -> Path:
        """The path of the picture of this number, from 1."""
        if request.file_name:
            stem = request.file_name.removesuffix(".png")
        elif self.options.use_original_file_name and request.image_path:
            stem = Path(request.image_path).stem
        elif self.options.sequential_file_name:
            self.last_number += 1
            stem = f"im_{self.last_number:06d}"
        else:
            stage = ("0" if is_first_stage else "1") if self.is_highres else ""
            stem = f"im_{time.strftime('%Y%m%d%H%M%S')}_{stage}{number:03d}_{request.seed}"
        return self._free(stem)

    def _free(self, stem: str) -> Path:
        path, count = self.folder / f"{stem}.png", 1
        while path.exists():
            count += 1
            path = self.folder / f"{stem}_{count}.png"
        return path


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def picture_text(request: PictureRequest, sampler: str, has_sizes: bool) -> dict[str, str]:
    """What a picture's file says of it, under kohya's keys; sizes are those of SDXL."""
    text = {
        "prompt": request.prompt,
        "seed": request.seed,
        "sampler": sampler,
        "steps": request.sample_steps,
        "scale": request.scale,
        "negative-prompt": request.negative_prompt or None,
        "negative-scale": request.negative_scale,
        "raw-prompt": request.raw_prompt,
    }
    if has_sizes:
        whole = (request.height, request.width, 0, 0)
        positive, negative = request.sizes or (whole, whole)
        text |= {
            "original-height": positive[0],
            "original-width": positive[1],
            "original-height-negative": negative[0],
            "original-width-negative": negative[1],
            "crop-top": positive[2],
            "crop-left": positive[3],
        }
    return {name: str(value) for name, value in text.items() if value is not None}


def write_with_text(path: Path, picture: Image.Image, text: dict[str, str]) -> None:
    """Write a PNG file with texts in it; those beyond Latin-1 go into chunks of UTF-8."""
    info, data = PngInfo(), io.BytesIO()
    for name, value in text.items():
        info.add_text(name, value) if value.isascii() else info.add_itxt(name, value)
    picture.save(data, format="PNG", pnginfo=info)
    write_bytes_whole(path, data.getbuffer())
