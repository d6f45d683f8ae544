"""LoRA training as a plain loop over diffusers, peft and accelerate, in the way of diffusers' own examples.

What they leave out is left out here too: nothing is cached, so that VAE and text encoders run at every step. Only the
layers are kohya's instead of the attention projections alone, so that as many weights are trained. The model is a
diffusers folder of SD 1.x or XL.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Pictures(Dataset):
    """Pictures of one size with the tokens of their captions, each from its files at every turn."""

    def __init__(self, folder: Path, resolution: int, tokenizers: list[CLIPTokenizer]):
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))
        self.resolution, self.tokenizers = resolution, tokenizers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        path, size = self.paths[index], (self.resolution, self.resolution)
        with Image.open(path) as image:
            image = image.convert("RGB")
            image = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        ids = [
            tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids[0]
            for tokenizer in self.tokenizers
        ]
        return {"pixels": pixels, "ids": ids}


def load_texts(folder: Path) -> tuple[list[CLIPTokenizer], list[nn.Module]]:
    tokenizers = [CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")]
    encoders: list[nn.Module] = [CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")]
    if (folder / "tokenizer_2").exists():
        tokenizers.append(CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"))
        encoders.append(CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"))
    return tokenizers, encoders


def adapted_layers(unet: nn.Module) -> list[str]:
    """The layers that kohya adapts by default: the linear ones and 1x1 convolutions of the transformers."""
    return [
        f"{outer}.{inner}"
        for outer, block in unet.named_modules()
        if type(block).__name__ == "Transformer2DModel"
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    ]


def condition(encoders: list[nn.Module], ids: list[Tensor], resolution: int) -> tuple[Tensor, dict | None]:
    """Hidden states [B, 77, D], and for SDXL the pooled text [B, D'] and the sizes [B, 6]."""
    if len(encoders) == 1:
        return encoders[0](ids[0], return_dict=False)[0], None
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, ids, strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * len(ids[0]), device=hidden.device)
    return hidden, {"text_embeds": outputs[1].text_embeds, "time_ids": sizes.to(hidden.dtype)}


def endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def save(unet: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in get_peft_model_state_dict(unet).items()}, path)


def train(options: argparse.Namespace) -> None:
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=not torch.cuda.is_available())
    torch.manual_seed(options.seed)
    folder, dtype = options.model, DTYPES[options.mixed_precision]
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizers, encoders = load_texts(folder)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for model in (vae, unet, *encoders):
        model.requires_grad_(False)
        model.to(accelerator.device, dtype=dtype)
    layers = adapted_layers(unet)
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=layers))
    if dtype != torch.float32:
        cast_training_params(unet, dtype=torch.float32)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    schedule = get_scheduler("constant", optimizer)
    loader = DataLoader(Pictures(options.pictures, options.resolution, tokenizers), options.batch_size, shuffle=True)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()
    batches = endless(loader)
    bar = tqdm(range(1, options.steps + 1))
    for step in bar:
        batch = next(batches)
        latents = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        count = scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        hidden, added = condition(encoders, batch["ids"], options.resolution)
        prediction = unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float())
        average = accelerator.gather(loss.repeat(options.batch_size)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.detach().item(), average=average.item())
        if options.save_every and not step % options.save_every:
            save(accelerator.unwrap_model(unet), options.output / f"step{step}.safetensors")
    save(accelerator.unwrap_model(unet), options.output / "lora.safetensors")
    assert math.isfinite(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save_every", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=DTYPES, default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
