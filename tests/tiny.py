"""Real SD 1.x, 2.x and SDXL models at toy size (random weights), their files, and pictures to train it with."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.families import family_class, family_of_kind
from library.families.base import ModelFamily
from library.families.checkpoints import LAYOUTS, Models, ldm_state_dict
from library.families.detect import inspect_checkpoint
from library.options.groups import TrainNetworkOptions

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class ToyText:
    """What differs between the toy text encoders."""

    hidden_size: int
    hidden_act: str
    pad_token_id: int
    model_class: type = CLIPTextModel


@dataclass(frozen=True)
class Toy:
    """What differs between the toy models: widths of the U-Net, its attention, its added embedding, the texts."""

    pipeline: str
    widths: tuple[int, int]
    num_heads: int | tuple[int, ...]
    attends_first: bool  # the first of the two blocks, or the second
    text_encoders: tuple[ToyText, ...]
    unet: dict = field(default_factory=dict)
    latent_scale: float = 0.18215


SIZES = dict(
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=64 + 6 * 256,
    transformer_layers_per_block=(1, 2),
)
SDXL_TEXTS = ToyText(32, "quick_gelu", 49407), ToyText(64, "gelu", 0, CLIPTextModelWithProjection)
TOYS = {  # by kind of checkpoint
    "sd1": Toy("StableDiffusionPipeline", (32, 64), 8, True, (ToyText(32, "quick_gelu", 49407),)),
    "sd2": Toy(
        "StableDiffusionPipeline", (64, 128), (1, 2), True, (ToyText(64, "gelu", 0),), dict(use_linear_projection=True)
    ),
    "sdxl": Toy("StableDiffusionXLPipeline", (64, 128), (1, 2), False, SDXL_TEXTS, SIZES, 0.13025),
}


def models(kind: str = "sd1") -> Models:
    """U-Net, VAE and text encoders whose configuration can be read off their shapes, as that of real ones can."""
    return _built(kind)


def forget_models() -> None:
    """Have them made again, after something was built into them."""
    _built.cache_clear()


@cache
def _built(kind: str) -> Models:
    toy = TOYS[kind]
    torch.manual_seed(0)
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    blocks = (attending, plain) if toy.attends_first else (plain, attending)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=toy.widths,
        layers_per_block=2,
        down_block_types=tuple(down for down, _ in blocks),
        up_block_types=tuple(up for _, up in reversed(blocks)),
        cross_attention_dim=sum(text.hidden_size for text in toy.text_encoders),
        attention_head_dim=toy.num_heads,
        **toy.unet,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=32,
        scaling_factor=toy.latent_scale,
    )
    text_encoders = tuple(_text_encoder(text).eval() for text in toy.text_encoders)
    return Models(unet.eval(), vae.eval(), text_encoders)


def _text_encoder(toy: ToyText) -> CLIPTextModel | CLIPTextModelWithProjection:
    return toy.model_class(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=toy.hidden_size,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=1,
            max_position_embeddings=77,
            hidden_act=toy.hidden_act,
            projection_dim=toy.hidden_size,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=toy.pad_token_id,
        )
    )


def write_folder(folder: Path, kind: str = "sd1", prediction_type: str | None = None) -> Path:
    """A diffusers folder, with a scheduler where the prediction type is given."""
    unet, vae, text_encoders = models(kind)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    for part, text_encoder in zip(LAYOUTS[kind].text_encoders, text_encoders, strict=True):
        text_encoder.save_pretrained(folder / part.folder)
    index = {"_class_name": TOYS[kind].pipeline}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    if prediction_type:
        (folder / "scheduler").mkdir()
        text = json.dumps(SCHEDULE | {"prediction_type": prediction_type})
        (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    return folder


def write_file(path: Path, dtype: torch.dtype = torch.float32, with_vae: bool = True, kind: str = "sd1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(dtype).contiguous() for name, value in ldm_state_dict(models(kind), kind).items()}
    if not with_vae:
        weights = {name: value for name, value in weights.items() if not name.startswith("first_stage_model.")}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 3}, path)
    return path


def load_family(options: TrainNetworkOptions, device: torch.device | None = None) -> ModelFamily:
    """The family of the checkpoint that the options name, in float32."""
    name = family_of_kind(inspect_checkpoint(options.pretrained_model_name_or_path))
    return family_class(name)(options, device or torch.device("cpu"), torch.float32)


def write_pictures(folder: Path, repeats_folder: str = "2_cat", count: int = 4) -> Path:
    """Pictures of 64x64 and 128x64 pixels, half of each, with captions."""
    target = folder / repeats_folder
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        width = 64 if index % 2 else 128
        pixels = rng.integers(0, 256, (8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, 64), Image.Resampling.NEAREST).save(target / f"picture {index}.png")
        (target / f"picture {index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    return folder


def arguments(model: Path, pictures: Path, output: Path, **more: object) -> list[str]:
    """The command line of a short training run; True is a bare flag, a list several words."""
    options: dict[str, object] = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": pictures,
        "output_dir": output,
        "output_name": "lora",
        "resolution": "96,96",
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "max_train_epochs": 1,
        "learning_rate": 0.001,
        "network_dim": 4,
        "seed": 1,
        "cache_latents": True,
        "caption_extension": ".txt",
        "max_data_loader_n_workers": 0,
    }
    words = []
    for name, value in (options | more).items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words
