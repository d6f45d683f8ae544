"""Train the embedded base: a real Stable Diffusion 1.x model at toy size that knows 18 things in 10 colours.

    python tools/build_demo_base.py --work_dir build/demo_base --output_dir assets/demo_base

No download: the training pictures are drawn (`tools/demo_drawings.py`). Stages end in files of `--work_dir` and are
skipped when these exist, so a stopped build goes on. Two CPU cores need about two hours, a GPU minutes.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_drawings import BACKGROUNDS, COLOURS, RADII, SIZE, THINGS, caption_of, drawings
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from library.families.clip import build_tokenizer
from library.files import write_text_whole, written_whole
from library.pictures import write_picture

LATENT_SCALE = 0.18215
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VOCABULARY_SIZE = 49408
BOS, EOS = 49406, 49407

VAE_CONFIG = dict(
    in_channels=3, out_channels=3, latent_channels=4, sample_size=SIZE, layers_per_block=1, norm_num_groups=2,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(16, 32, 32, 64), scaling_factor=LATENT_SCALE,
)  # fmt: skip
UNET_CONFIG = dict(
    sample_size=SIZE // 8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64, 64, 64),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=40, attention_head_dim=8, norm_num_groups=4,
)  # fmt: skip
TEXT_CONFIG = dict(
    hidden_size=40, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77,
    hidden_act="quick_gelu", projection_dim=40, bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for matrices and convolutions, AdamW for the rest (arXiv:2502.16982)."""

    def __init__(self, modules: list[nn.Module], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        embeddings = {
            p for module in modules for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        matrices = [p for p in parameters if p.ndim >= 2 and p not in embeddings]
        others = [p for p in parameters if p.ndim < 2 or p in embeddings]
        super().__init__([{"params": matrices}], dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.base_lr = lr

    def set_lr_factor(self, factor: float) -> None:
        for group in [*self.param_groups, *self.adamw.param_groups]:
            group["lr"] = self.base_lr * factor

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = orthogonalised(update) * (0.2 * math.sqrt(max(update.shape)))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": super().state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five quintic Newton-Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Average:
    """An exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        targets, sources = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(targets, sources, 1 - self.decay)


def as_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_model_input(pictures: Tensor, device: str) -> Tensor:
    return pictures.to(device).float() / 127.5 - 1  # [B, 3, H, W] in [-1, 1]


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(count, generator=generator).split(batch_size):
            if len(indices) == batch_size:
                yield indices


class Progress:
    """One line a hundred steps: loss averaged over them, and when it will end."""

    def __init__(self, name: str, num_steps: int, first_step: int):
        self.name, self.num_steps, self.first_step = name, num_steps, first_step
        self.started, self.losses = time.perf_counter(), []

    def add(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == self.num_steps:
            seconds = (time.perf_counter() - self.started) / (step + 1 - self.first_step)
            mean = torch.stack(self.losses).mean().item()
            left = seconds * (self.num_steps - step - 1) / 60
            print(
                f"{self.name} {step + 1}/{self.num_steps}  loss {mean:.4f}  {seconds:.3f} s/step  {left:.0f} min left",
                flush=True,
            )
            self.losses = []


def zero_last_convolutions(vae: AutoencoderKL) -> None:
    """Let every residual branch start as the identity."""
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if type(module).__name__ == "Attention":
            nn.init.zeros_(module.to_out[0].weight)


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def vae_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    latents = latents + 0.08 * torch.randn_like(latents) * latents.detach().std()
    decoded = vae.decode(latents).sample
    loss = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)
    loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pictures), strict=True))
    return loss + 3e-4 * posterior.kl().mean() / latents[0].numel()


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Move mean and spread of the latents into (post_)quant_conv, so that 0.18215 gives zero mean, unit variance."""
    means = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(64)])
    mean = means.mean(dim=(0, 2, 3))  # [4]
    scale = means.std(dim=(0, 2, 3)) * LATENT_SCALE
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:4] /= scale.view(4, 1, 1, 1)
    bias[:4] = (bias[:4] - mean) / scale
    bias[4:] -= 2 * scale.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= scale.view(1, 4, 1, 1)


def train_vae(pictures: Tensor, num_steps: int, device: str) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = AutoencoderKL(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    zero_last_convolutions(vae)
    optimizer, average = Muon([vae], lr=2e-3), Average(vae, 0.995)
    batches, progress = shuffled_batches(len(pictures), 16, seed=1), Progress("vae", num_steps, 0)
    for step in range(num_steps):
        optimizer.set_lr_factor(0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        batch = as_model_input(pictures[next(batches)], device).contiguous(memory_format=torch.channels_last)
        if step < 0.8 * num_steps:  # crops: the same work teaches more edges
            top, left = (8 * torch.randint(0, SIZE // 16 + 1, (2,))).tolist()
            batch = batch[:, :, top : top + 64, left : left + 64]
        loss = vae_loss(vae, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        progress.add(step, loss)
    fold_latent_statistics(average.model, as_model_input(pictures[:1024], device))
    return average.model


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, device: str) -> Tensor:
    batches = [as_model_input(batch, device) for batch in pictures.split(64)]
    return torch.cat([vae.encode(batch).latent_dist.mode() * LATENT_SCALE for batch in batches])


class Words:
    """The token ids that captions use, numbered 0, 1, 2, ... for training; 0 is BOS, 2 is EOS and padding."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        sizes, colours, backgrounds = sorted(RADII), sorted(COLOURS), sorted(BACKGROUNDS)
        captions = [caption_of(s, c, t, b) for s in sizes for c in colours for b in backgrounds for t in sorted(THINGS)]
        captions += [short_form(caption) for caption in captions]
        ids = sorted({i for caption in captions for i in tokenizer(caption).input_ids} - {BOS, EOS})
        self.ids = torch.tensor([BOS, ids[0], EOS, *ids[1:]])  # row -> token id
        self.row_of = {int(token): row for row, token in enumerate(self.ids)}

    def rows(self, captions: list[str]) -> Tensor:
        padded = self.tokenizer(captions, padding="max_length", truncation=True, max_length=77).input_ids
        return torch.tensor([[self.row_of[token] for token in line] for line in padded])  # [B, 77]


def short_form(caption: str) -> str:
    """Tags instead of a sentence: "small yellow fish, blue background"."""
    thing, background = caption.removeprefix("a ").split(" on a ")
    return f"{thing}, {background}"


def stratified_timesteps(count: int) -> Tensor:
    strata = (torch.arange(count) + torch.rand(count)) / count
    return (strata[torch.randperm(count)] * 1000).long().clamp_(max=999)


def build_denoiser(words: Words) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    torch.manual_seed(2)
    return UNet2DConditionModel(**UNET_CONFIG), CLIPTextModel(CLIPTextConfig(vocab_size=len(words.ids), **TEXT_CONFIG))


def train_denoiser(
    latents: Tensor, captions: list[str], words: Words, num_steps: int, state_path: Path, device: str
) -> tuple[nn.Module, nn.Module]:
    """U-Net and text encoder together, epsilon target, caption dropout 10 %; the state is kept every 250 steps."""
    unet, text_encoder = build_denoiser(words)
    unet.to(device, memory_format=torch.channels_last)
    text_encoder.to(device).train()
    optimizer = Muon([unet, text_encoder], lr=2e-3)
    averages = Average(unet, 0.998), Average(text_encoder, 0.998)
    models = {
        "unet": unet,
        "text_encoder": text_encoder,
        "unet_average": averages[0].model,
        "text_average": averages[1].model,
        "optimizer": optimizer,
    }
    first_step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        first_step = state.pop("step")
        for name, part in state.items():
            models[name].load_state_dict(part)
    rows = torch.stack([words.rows([caption, short_form(caption)]) for caption in captions]).to(device)  # [N, 2, 77]
    empty = words.rows([""]).to(device)[0]
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod
    batches, progress = shuffled_batches(len(latents), 32, seed=2 + first_step), Progress("unet", num_steps, first_step)
    torch.manual_seed(3 + first_step)
    for step in range(first_step, num_steps):
        optimizer.set_lr_factor(min(1.0, (step + 1) / 50, 2 * (1 - step / num_steps)))
        indices = next(batches)
        ids = rows[indices.to(device), (torch.rand(32) < 0.3).long().to(device)]
        ids[torch.rand(32) < 0.1] = empty
        clean, timesteps = latents[indices.to(device)], stratified_timesteps(32)
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(device)
        noise = torch.randn_like(clean)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        hidden = text_encoder(ids)[0]
        loss = F.mse_loss(unet(noisy, timesteps.to(device), hidden).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*unet.parameters(), *text_encoder.parameters()], 1.0)
        optimizer.step()
        averages[0].update(unet)
        averages[1].update(text_encoder)
        progress.add(step, loss)
        if (step + 1) % 250 == 0:
            with written_whole(state_path) as unfinished:
                torch.save({"step": step + 1, **{name: part.state_dict() for name, part in models.items()}}, unfinished)
    return averages[0].model, averages[1].model


def with_whole_vocabulary(text_encoder: CLIPTextModel, words: Words) -> CLIPTextModel:
    """The text encoder with all 49,408 rows; rows never trained are signs times the trained rows' spread.

    Signs of one size compress sixteen times better than random floats, and keep unknown words apart.
    """
    trained = text_encoder.get_input_embeddings().weight.detach().cpu()
    config = TEXT_CONFIG | dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    whole = CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY_SIZE, **config))
    signs = torch.randint(0, 2, (VOCABULARY_SIZE, trained.shape[1]), generator=torch.Generator().manual_seed(4)) * 2 - 1
    table = signs * trained.std()
    table[words.ids] = trained
    state = {name: value.cpu() for name, value in text_encoder.state_dict().items()}
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    whole.load_state_dict(state | {name: table})
    return whole


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_json(path: Path, content: dict) -> None:
    write_text_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_diffusers_folder(folder: Path, unet: nn.Module, vae: nn.Module, text_encoder: CLIPTextModel) -> None:
    """A model folder in the layout of SD 1.x, weights in fp16."""
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **SCHEDULE})
    for name, model in {"unet": unet, "vae": vae, "text_encoder": text_encoder}.items():
        text = model.config.to_json_string() if name == "text_encoder" else model.to_json_string()
        config = {key: value for key, value in json.loads(text).items() if key not in ("_name_or_path", "dtype")}
        write_json(folder / name / "config.json", config)
        weights = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
        if name == "text_encoder":  # the names every version of transformers reads
            weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
        file_name = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        with written_whole(folder / name / file_name) as unfinished:
            save_file(weights, unfinished, metadata={"format": "pt"})


def sample_grid(
    unet, vae, text_encoder, embed: Callable[[list[str]], Tensor], prompts: list[str], device: str
) -> Image.Image:
    """Three seeds of each prompt, 25 DDIM steps, guidance 5."""
    scheduler = DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(25)
    sheet = Image.new("RGB", (SIZE * len(prompts), SIZE * 3))
    with torch.no_grad():
        both = text_encoder(embed([""] * len(prompts) + prompts).to(device))[0]
        for row in range(3):
            latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(row)).to(device)
            latents = latents.repeat(len(prompts), 1, 1, 1)
            for timestep in scheduler.timesteps:
                negative, positive = unet(torch.cat([latents] * 2), timestep, both).sample.chunk(2)
                latents = scheduler.step(negative + 5 * (positive - negative), timestep, latents).prev_sample
            pictures = vae.decode(latents / LATENT_SCALE).sample.clamp(-1, 1)
            for column, picture in enumerate(((pictures + 1) * 127.5).byte().permute(0, 2, 3, 1).cpu().numpy()):
                sheet.paste(Image.fromarray(picture), (SIZE * column, SIZE * row))
    return sheet


PROBES = [
    "a red heart on a white background", "a yellow star on a blue background", "a green tree on a pink background",
    "a blue car on a white background", "a small orange fish on a blue background",
    "a pink cat on a green background", "a big red mushroom on a gray background",
    "a purple house on a yellow background", "a white boat on a blue background",
    "a pink flower on a white background", "a black ring on a pink background",
    "a orange balloon on a purple background",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="train the embedded demo base")
    parser.add_argument("--work_dir", type=Path, default=Path("build/demo_base"))
    parser.add_argument("--output_dir", type=Path, default=Path("assets/demo_base"))
    parser.add_argument("--num_pictures", type=int, default=14400)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=5000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)

    words = Words(build_tokenizer())
    pairs = list(drawings(options.num_pictures, seed=0))
    pictures = torch.stack([as_uint8(image) for image, _ in pairs])
    captions = [caption for _, caption in pairs]

    vae_path = options.work_dir / "vae.safetensors"
    if vae_path.exists():
        vae = AutoencoderKL(**VAE_CONFIG)
        vae.load_state_dict(load_file(vae_path))
        vae.to(options.device)
    else:
        vae = train_vae(pictures, options.vae_steps, options.device)
        with written_whole(vae_path) as unfinished:
            save_file({key: value.contiguous() for key, value in vae.state_dict().items()}, unfinished)
    latents = encode_pictures(vae, pictures, options.device)
    print(f"latents: mean {latents.mean().item():.3f}, std {latents.std().item():.3f}", flush=True)

    unet, text_encoder = train_denoiser(
        latents, captions, words, options.unet_steps, options.work_dir / "unet.pt", options.device
    )
    grid = sample_grid(unet, vae, text_encoder, words.rows, PROBES, options.device)
    write_picture(options.work_dir / "grid.png", grid)
    write_diffusers_folder(options.output_dir, unet, vae, with_whole_vocabulary(text_encoder, words))
    print(f"written: {options.output_dir}; look at {options.work_dir / 'grid.png'}")


if __name__ == "__main__":
    main()
