"""Pictures of a class as the base model draws it, for regularisation."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.errors import UserError
from library.families import family_class
from library.options.groups import ModelOptions
from library.pictures import write_picture
from library.training.prompts import SamplePrompt
from library.training.sampling import draw

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ClassPicture:
    """A picture to draw, and its file."""

    path: Path
    prompt: SamplePrompt

    def parameters(self, model: str) -> str:
        """What it was drawn with, as WebUIs write it into their pictures."""
        prompt = self.prompt
        lines = [prompt.prompt]
        lines += [f"Negative prompt: {prompt.negative_prompt}"] if prompt.negative_prompt else []
        return "\n".join(lines) + (
            f"\nSteps: {prompt.sample_steps}, Sampler: {prompt.sample_sampler}, CFG scale: {prompt.scale}, "
            f"Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}, Model: {model}"
        )


def missing_pictures(folder: Path, count: int, prompt: SamplePrompt) -> list[ClassPicture]:
    """Those of `count` numbered pictures that are not there; each has the seed of its number."""
    numbered = ((number, folder / f"{number:06d}.png") for number in range(1, count + 1))
    first = prompt.seed or 0
    return [
        ClassPicture(path, replace(prompt, seed=first + number - 1)) for number, path in numbered if not path.exists()
    ]


def draw_pictures(
    options: ModelOptions, family_name: str, mixed_precision: str, pictures: list[ClassPicture]
) -> Iterator[ClassPicture]:
    """Draw and write pictures one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU, and none is usable here; give bf16 or no")
    family = family_class(family_name)(options, device, DTYPES[mixed_precision])
    model = Path(options.pretrained_model_name_or_path).stem
    for picture in pictures:
        image = draw(family, picture.prompt, "ddim")
        write_picture(picture.path, image, {"parameters": picture.parameters(model)})
        yield picture
