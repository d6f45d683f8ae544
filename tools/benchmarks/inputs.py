"""What contestants train on, made without a network and kept between calls: a random model, and pictures. No torch."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
WORDS = ["garden", "smile", "blue sky", "tree", "hat", "red dress", "long hair", "from side", "standing", "outdoors"]
FEW = 4  # pictures of a run whose steps are timed
REPEATS = 1000  # of each picture in an epoch, so that no run reaches its end


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of one choice of model and resolution are."""

    work: Path
    kind: str  # "sd1", "sdxl"
    size: str  # "toy", "full"
    resolution: int
    batch: int
    rank: int

    @property
    def model_dir(self) -> Path:
        return self.work / f"{self.size}-{self.kind}"

    @property
    def file(self) -> Path:
        return self.model_dir / "model.safetensors"

    @property
    def folder(self) -> Path:
        return self.model_dir / "diffusers"

    def make_models(self) -> None:
        if not (self.folder / "model_index.json").is_file():
            self.model_dir.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(HERE / "models.py"), str(self.model_dir), self.kind, self.size]
            subprocess.run(command, check=True, capture_output=True, text=True)

    def pictures(self, count: int, repeats: int, scale: float = 1.0) -> Path:
        """A folder with this many square pictures, `scale` times as large as training wants them, with captions."""
        side = round(self.resolution * scale)
        root = self.work / "pictures" / f"{count}x{side}-{repeats}"
        folder = root / f"{repeats}_picture"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            make_picture(folder / f"{number:04d}", number, side, as_photo=scale != 1.0)
        return root

    def torch_facts(self) -> dict:
        """Version of torch, name of the GPU, FLOPs of a step; asked of another process, so that none has torch here."""
        numbers = [str(number) for number in (self.resolution, self.batch, self.rank)]
        command = [sys.executable, str(HERE / "torch_facts.py"), str(self.folder), *numbers]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(printed.splitlines()[-1])


def make_picture(path: Path, seed: int, side: int, as_photo: bool) -> None:
    """Coloured clouds: a PNG of the size that is trained, or a JPEG as a camera has them; and twelve tags."""
    image, caption = path.with_suffix(".jpg" if as_photo else ".png"), path.with_suffix(".txt")
    if image.exists() and caption.exists():
        return
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    cells.resize((side, side), Image.Resampling.BICUBIC).save(image)
    caption.write_text(", ".join([f"picture {seed}", *rng.choice(WORDS, 11)]), encoding="utf-8")
