"""Write a Stable Diffusion checkpoint of full size with random weights: for trials and timings without a download.

python tools/make_random_checkpoint.py build/random_sd15.safetensors
python tools/make_random_checkpoint.py build/random_sdxl.safetensors --kind sdxl --dtype bf16
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))
from library.families.checkpoints import Models, ldm_state_dict
from library.files import written_whole

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
OPEN_CLIP_H = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
OPEN_CLIP_G = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    projection_dim=1280,
)  # fmt: skip
SDXL_UNET = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
KINDS = {  # kind of checkpoint -> its U-Net, and its text encoders with their classes
    "sd1": (dict(cross_attention_dim=768, attention_head_dim=8), [(CLIPTextModel, CLIP_L)]),
    "sd2": (
        dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        [(CLIPTextModel, OPEN_CLIP_H)],
    ),
    "sdxl": (SDXL_UNET, [(CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, OPEN_CLIP_G)]),
}


def random_models(kind: str) -> Models:
    """Models of full size, initialised as before training: 1.07, 1.29 and 3.47 thousand million parameters."""
    unet, texts = KINDS[kind]
    text_encoders: list[nn.Module] = [model(CLIPTextConfig(vocab_size=49408, **config)) for model, config in texts]
    return Models(UNet2DConditionModel(**unet), AutoencoderKL(**VAE), tuple(text_encoders))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="sd1")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[options.dtype])  # so that fp32 models are never in memory
    weights = {
        name: value.contiguous() for name, value in ldm_state_dict(random_models(options.kind), options.kind).items()
    }
    num_bytes = sum(value.nbytes for value in weights.values())
    with written_whole(options.path, num_bytes=num_bytes) as temporary:
        save_file(weights, temporary)
    print(f"{options.path}: {len(weights)} weights, {options.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
