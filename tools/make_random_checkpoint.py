"""Write a Stable Diffusion 1.5 checkpoint of full size with random weights: for trials and timings without a download.

python tools/make_random_checkpoint.py build/random_sd15.safetensors
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from library.families.checkpoints import ldm_state_dict
from library.files import written_whole


def sd15_models() -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """860 M, 84 M and 123 M parameters, initialised as before training."""
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )
    return unet, vae, text_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = {name: value.half().contiguous() for name, value in ldm_state_dict(*sd15_models()).items()}
    with written_whole(options.path) as temporary:
        save_file(weights, temporary)
    print(f"{options.path}: {len(weights)} weights, {options.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
