"""Draw pictures of a class with the base model, for --reg_data_dir: what the model knows and shall not forget.

python tools/make_regularization_images.py --pretrained_model_name_or_path model.safetensors --class_tokens woman \
    --num_images 200 --output_dir reg
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError, counted, run_script
from library.importing import quick_imports
from library.logs import start_logging
from library.options.checks import at_least, at_most, file_name, problems_of
from library.options.cli import read_options
from library.options.derived import resolution_wh
from library.options.fields import REQUIRED, option
from library.options.groups import MAX_SEED, SAMPLERS, LoggingOptions, ModelOptions
from library.options.honoured import NOT_HONOURED

logger = logging.getLogger("make_regularization_images")

WITHOUT_EFFECT = {name: NOT_HONOURED[name] for name in ("tokenizer_cache_dir", "lowram", "highvram")} | {
    "max_token_length": "a prompt has as many tokens as it needs",
    "weighted_captions": "weights in prompts always count",
}
DEFAULT_SIDES = {"sd1": "512", "sd2": "768", "sdxl": "1024"}  # by kind of checkpoint, pixels


@dataclass(frozen=True, kw_only=True)
class RegularizationOptions(ModelOptions):
    """Draw pictures of a class with the base model, for --reg_data_dir."""

    output_dir: str = option(REQUIRED, "folder for the folders 1_CLASS of pictures", flag_type="path")
    class_tokens: list[str] = option(REQUIRED, "what the pictures show, such as woman; several make a folder each")
    prompt: str = option("a photo of a {class}", "what is drawn; {class} stands for the class")
    negative_prompt: str = option("", "what is not wanted in a picture")
    num_images: int = option(100, "pictures of each class")
    resolution: str | None = option(None, "size in pixels: SIDE or WIDTH,HEIGHT; the model's own when not given")
    sample_steps: int = option(30, "steps of the sampler")
    scale: float = option(7.5, "how closely a picture follows its prompt (classifier-free guidance)")
    sample_sampler: str = option("ddim", "sampler", choices=SAMPLERS)
    seed: int = option(1, "seed of the first picture; each one after it has the next")
    mixed_precision: str = option("no", "number format of the model", choices=("no", "fp16", "bf16"))

    def check(self) -> list[str]:
        return [
            *at_least(self, 1, "num_images", "sample_steps"),
            *at_most(self, 1000, "sample_steps"),
            *at_least(self, 0, "seed"),
            *at_most(self, MAX_SEED - self.num_images, "seed"),
            *(problem for name in self.class_tokens for problem in file_name("class_tokens", name, "output_dir")),
            *(problems_of(resolution_wh, self) if self.resolution else []),
        ]


OPTIONS = RegularizationOptions


def main(argv: list[str] | None = None) -> None:
    start_logging(LoggingOptions())
    options = read_options(OPTIONS, argv)
    family, side = look_at_model(options)
    with quick_imports():
        from library.recipes.class_pictures import draw_pictures, missing_pictures  # torch and diffusers
        from library.training.prompts import SamplePrompt, rounded

    width, height = resolution_wh(options) if options.resolution else (int(side), int(side))
    pictures = []
    for name in options.class_tokens:
        prompt = SamplePrompt(
            options.prompt.replace("{class}", name),
            options.negative_prompt,
            width,
            height,
            options.sample_steps,
            options.scale,
            options.seed,
            options.sample_sampler,
        )
        folder = Path(options.output_dir) / f"1_{name}"
        missing = missing_pictures(folder, options.num_images, rounded(prompt))
        if done := options.num_images - len(missing):
            logger.info("%s: %s there already", folder, counted(done, "picture"))
        pictures += missing
    from tqdm import tqdm

    drawn = draw_pictures(options, family, options.mixed_precision, pictures) if pictures else ()
    for _ in tqdm(drawn, total=len(pictures), desc="drawing", unit="pictures", disable=not pictures):
        pass
    print(f"drew {counted(len(pictures), 'picture')}; train with --reg_data_dir {options.output_dir}")


def look_at_model(options: RegularizationOptions) -> tuple[str, str]:
    """The model's family and the side of its pictures; UserError for what cannot work, before torch is imported."""
    from library.families import family_of_kind
    from library.families.agreement import check_clip_skip, prediction_warning, version_warning
    from library.families.detect import inspect_checkpoint
    from library.folders import check_writable
    from library.given_files import check_vae

    if problems := check_writable("output_dir", options.output_dir):
        raise UserError(*problems)
    checkpoint = inspect_checkpoint(options.pretrained_model_name_or_path)
    family = family_of_kind(checkpoint)
    check_clip_skip(options, checkpoint)
    if options.vae:
        check_vae(options.vae, checkpoint)
    about_model = [version_warning(options, checkpoint), prediction_warning(options, checkpoint)]
    unused = [f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if getattr(options, name)]
    for warning in filter(None, [*about_model, *unused]):
        logger.warning(warning)
    return family, DEFAULT_SIDES[checkpoint.kind]


if __name__ == "__main__":
    run_script(main)
