"""Writes the random model that all contestants train: one file in the LDM layout, and the same as a diffusers folder.

python tools/benchmarks/models.py FOLDER KIND full|toy
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from library.families.checkpoints import LAYOUTS, Models, ldm_state_dict
from library.families.clip import build_tokenizer
from library.families.clip_vocabulary import clip_vocabulary
from library.files import write_text_whole, written_whole
from tests import tiny
from tools.make_random_checkpoint import random_models

LATENT_SCALES = {"sd1": 0.18215, "sdxl": 0.13025}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PAD_TOKENS = "<|endoftext|>", "!"  # of the first and the second text encoder
KOHYAS_NAMES = "openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"


def build(kind: str, size: str) -> Models:
    """The models of a toy in fp32, as the tests have them, or of full size in fp16."""
    if size == "toy":
        return tiny.models(kind)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        return random_models(kind)
    finally:
        torch.set_default_dtype(torch.float32)


def write_file(path: Path, models: Models, kind: str) -> None:
    weights = {name: value.contiguous() for name, value in ldm_state_dict(models, kind).items()}
    with written_whole(path, num_bytes=sum(value.nbytes for value in weights.values())) as unfinished:
        save_file(weights, unfinished)


def write_folder(folder: Path, models: Models, kind: str) -> None:
    """Models, tokenizers and schedule; the index is written last, and says that the folder is whole."""
    models.vae.register_to_config(scaling_factor=LATENT_SCALES[kind])
    models.unet.save_pretrained(folder / "unet")
    models.vae.save_pretrained(folder / "vae")
    parts = zip(LAYOUTS[kind].text_encoders, models.text_encoders, PAD_TOKENS, strict=False)
    for part, text_encoder, pad_token in parts:
        text_encoder.save_pretrained(folder / part.folder)
        tokenizer = build_tokenizer(pad_token)
        tokenizer.save_pretrained(folder / part.folder.replace("text_encoder", "tokenizer"))
    (folder / "scheduler").mkdir(exist_ok=True)
    schedule = {"_class_name": "DDPMScheduler", **tiny.SCHEDULE, "clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule), encoding="utf-8")
    write_text_whole(folder / "model_index.json", json.dumps({"_class_name": PIPELINES[kind]}))


def write_kohyas_tokenizers(folder: Path) -> None:
    """CLIP's vocabulary where --tokenizer_cache_dir of sd-scripts looks for it, so that it downloads nothing."""
    vocabulary, merges = clip_vocabulary()
    for name, pad_token in zip(KOHYAS_NAMES, PAD_TOKENS, strict=True):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad_token,
        }
        (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main(folder: Path, kind: str, size: str) -> None:
    models = build(kind, size)
    write_file(folder / "model.safetensors", models, kind)
    write_kohyas_tokenizers(folder / "tokenizers")
    write_folder(folder / "diffusers", models, kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
