"""Encode the pictures of a metadata file into latents beside them, and note their buckets in the metadata.

python tools/prepare_buckets_latents.py pictures metadata.json with_buckets.json model.safetensors
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.captioning.listing import find_pictures, folder_problems
from library.captioning.metadata import json_problems, read_metadata, write_metadata
from library.errors import UserError, counted, run_script
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from tools.cache_latents import fill, read_caching_options

# What training calls the options of this script that have other names.
NAMES = {"--pretrained_model_name_or_path": "model_name_or_path", "--resolution": "--max_resolution"}
NAMES |= {"--in_json": "in_json", "--vae_batch_size": "--batch_size"}
SAME = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "mixed_precision", "max_data_loader_n_workers")
SWITCHES = ("v2", "bucket_no_upscale", "flip_aug", "skip_existing")
OFF = ("", "0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(OptionGroup):
    """Encode the pictures of a metadata file, and note their buckets in it."""

    train_data_dir: str = option(REQUIRED, "folder of pictures", flag_type="path", is_positional=True)
    in_json: str = option(REQUIRED, "metadata file, .json or .jsonl", flag_type="path", is_positional=True)
    out_json: str = option(REQUIRED, "metadata file with the buckets", flag_type="path", is_positional=True)
    model_name_or_path: str = option(
        REQUIRED, "base model whose VAE is taken: a file, or a folder in diffusers layout", flag_type="path",
        is_positional=True,
    )  # fmt: skip
    v2: bool = option(False, "the base model is Stable Diffusion 2.x")
    batch_size: int = option(1, "pictures that the VAE sees at once")
    max_data_loader_n_workers: int | None = option(None, "threads that read pictures; 8 when not given")
    max_resolution: str = option("512,512", "size of training in pixels: SIDE or WIDTH,HEIGHT")
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this many pixels")
    bucket_no_upscale: bool = option(False, "never enlarge a picture to fill its bucket")
    mixed_precision: str = option("no", "number format of the VAE", choices=("no", "fp16", "bf16"))
    full_path: bool = option(False, "name new pictures by their whole paths, not by those below train_data_dir")
    flip_aug: bool = option(False, "encode mirrored pictures too")
    alpha_mask: str = option("", "true: keep the transparency of pictures as their mask")
    skip_existing: bool = option(False, "take the latents that are there without reading them")
    recursive: bool = option(False, "take the pictures in folders of the folder too")

    def check(self) -> list[str]:
        return [*folder_problems(self.train_data_dir), *json_problems(self.in_json, self.out_json, "in_json")]


OPTIONS = PrepareOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    try:
        prepare(options)
    except UserError as error:
        raise type(error)(*map(renamed, error.problems)) from error


def prepare(options: PrepareOptions) -> None:
    """Write the metadata of all pictures, their latents, and the metadata with the buckets."""
    from library.dataset.buckets import choose_buckets_of
    from library.families.detect import inspect_checkpoint

    caching = read_caching_options(words_of(options), "--cache_latents_to_disk")
    inspect_checkpoint(options.model_name_or_path, "model_name_or_path")
    root, out = Path(os.path.abspath(options.train_data_dir)), Path(options.out_json)
    metadata = read_metadata(Path(options.in_json), root, options.full_path)
    for picture in find_pictures(root, options.recursive):
        metadata.entry_of(picture)
    write_metadata(out, metadata.entries)
    (dataset,) = fill(replace(caching, in_json=options.out_json)).datasets
    for record, choice in zip(dataset.records, choose_buckets_of(dataset), strict=True):
        sizes = dict(image_size=list(record.size_wh), train_resolution=list(choice.bucket_wh))
        metadata.entry_of(record.path).update(sizes)
    write_metadata(out, metadata.entries)
    print(f"the latents of {counted(len(dataset.records), 'picture')} are on disk, their buckets in {out}")


def words_of(options: PrepareOptions) -> list[str]:
    """The same in the words of the training scripts."""
    given = {
        "pretrained_model_name_or_path": options.model_name_or_path,
        "train_data_dir": os.path.abspath(options.train_data_dir),
        "in_json": options.in_json,
        "resolution": options.max_resolution,
        "vae_batch_size": options.batch_size,
        **{name: getattr(options, name) for name in SAME},
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    words += [f"--{name}" for name in SWITCHES if getattr(options, name)]
    return [*words, "--enable_bucket", *([] if options.alpha_mask.lower() in OFF else ["--alpha_mask"])]


def renamed(problem: str) -> str:
    """A sentence on an option of training as one on this script's."""
    for name, own in NAMES.items():
        problem = problem.replace(name, own)
    return problem


if __name__ == "__main__":
    run_script(main)
