"""Stable Diffusion 1.x and 2.x: what the model is made of, and how training asks it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import CLIPTextModel

from library.families import clip
from library.families.base import AdapterTarget, Batch, Checkpoint, Conds, KohyaModels
from library.families.blocks import BlockLayout
from library.families.checkpoints import load_models
from library.families.detect import inspect_checkpoint
from library.families.kohya_view import view_of
from library.families.text_memory import TextMemory
from library.options.groups import ModelOptions

LATENT_SCALE = 0.18215  # arXiv:2112.10752, appendix G

TEXT_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
UNET_CLASSES = ("Transformer2DModel",)
UNET_CONV_CLASSES = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
# Attention has another name in kohya's U-Net. The time embedding has not, but LyCORIS 4.1 means another model's class
# by that name, takes these layers twice, and stops.
KOHYA_UNET_CLASSES = {"Attention": "CrossAttention", "TimestepEmbedding": "TimeEmbedding"}
BLOCKS = BlockLayout(num_down=12, num_mid=1, num_up=12)


@dataclass(frozen=True)
class SdVersion:
    """What differs between SD 1.x and 2.x once they are loaded: the tokenizer, and what metadata says."""

    is_v2: bool
    pad_token: str
    base_model: str  # ss_base_model_version, with _v behind it where the model predicts velocity
    epsilon: tuple[str, str]  # modelspec.architecture and usual resolution of a model that predicts noise
    v: tuple[str, str]  # and of one that predicts velocity


V1 = "stable-diffusion-v1", "512x512"
VERSIONS = {  # by kind of checkpoint
    "sd1": SdVersion(False, "<|endoftext|>", "sd_v1", epsilon=V1, v=V1),
    "sd2": SdVersion(
        True,
        "!",
        "sd_v2",
        epsilon=("stable-diffusion-v2-512", "512x512"),
        v=("stable-diffusion-v2-768-v", "768x768"),
    ),
}


class Sd:
    """U-Net, VAE, CLIP text encoder and tokenizer of an SD 1.x or 2.x checkpoint."""

    name = "sd"
    latent_scale = LATENT_SCALE

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype):
        self.options = options
        self.device = device
        self.dtype = dtype
        self.v_prediction = options.v_parameterization
        self.vae_dtype = torch.float32 if options.no_half_vae else dtype
        checkpoint = inspect_checkpoint(options.pretrained_model_name_or_path)
        self.version = VERSIONS[checkpoint.kind]
        self.tokenizer = clip.build_tokenizer(self.version.pad_token)
        models = load_models(checkpoint, options.vae, dtype, self.vae_dtype)
        self.unet, self.vae, (self.text_encoder,) = models
        for model in (self.text_encoder, self.vae, self.unet):
            model.requires_grad_(False).eval()
        self.unet.to(device)
        self.text_encoder.to(device)
        self.trains_text_encoder = False
        self._text_memory = TextMemory(lambda caption: {"hidden": self.encode_text([caption])[0]}, device, dtype)

    @property
    def num_chunks(self) -> int:
        """Passes of 75 tokens that a caption gets."""
        return (self.options.max_token_length or clip.CHUNK) // clip.CHUNK

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self.text_encoder]

    def enable_gradient_checkpointing(self, checkpoint: Checkpoint | None = None) -> None:
        """Recompute activations in the backward pass, those of the U-Net's blocks in the way given.

        Needs train mode, which changes nothing else in SD.
        """
        self.unet.enable_gradient_checkpointing(checkpoint)
        self.unet.train()
        if self.trains_text_encoder:
            self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.text_encoder.train()

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, 4, h, w], not scaled, sampled from the VAE's posterior of images [B, 3, H, W] in [-1, 1]."""
        return self._posterior(images).sample().float()

    def latent_distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [B, 4, h, w] each, of what `encode_images` samples from."""
        posterior = self._posterior(images)
        return posterior.mean.float(), posterior.std.float()

    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        self.vae.to(self.device)
        with torch.no_grad():
            return self.vae.encode(images.to(self.device, self.vae_dtype)).latent_dist

    def release_vae(self) -> None:
        """Take the VAE off the device once nothing needs it there."""
        self.vae.to("cpu")

    def latents(self, batch: Batch) -> Tensor:
        latents = batch.latents if batch.latents is not None else self.encode_images(batch.images)
        return latents * self.latent_scale

    def conds(self, batch: Batch) -> Conds:
        if self.trains_text_encoder:
            return {"hidden": self.encode_text(batch.captions)}
        return self._text_memory.conds(batch.captions)

    def remember_text(self, captions: Sequence[str], progress: Callable[[], object]) -> bool:
        if not self._text_memory.fill(captions, progress):
            return False
        self.text_encoder.to("cpu")
        return True

    def encode_text(self, captions: list[str]) -> Tensor:
        """Hidden states [B, L, D] of captions, L = 75 num_chunks + 2; with --weighted_captions times their weights."""
        if self.options.weighted_captions:
            ids, weights = clip.tokenize_weighted(self.tokenizer, captions, self.num_chunks)
            hidden = self._hidden_states(ids)
            return hidden * weights.to(hidden)
        return self._hidden_states(clip.tokenize(self.tokenizer, captions, self.num_chunks))

    def _hidden_states(self, ids: Tensor) -> Tensor:
        if self._text_memory.is_complete:  # a preview's prompt: training asks no more
            self.text_encoder.to(self.device)
        hidden = clip.encode(self.text_encoder, ids.to(self.device), self.options.clip_skip)
        if self._text_memory.is_complete:
            self.text_encoder.to("cpu")
        return hidden

    def predict(self, noisy: Tensor, timesteps: Tensor, conds: Conds, batch: Batch) -> Tensor:
        return self.unet(noisy, timesteps, conds["hidden"], return_dict=False)[0]

    def adapter_targets(self, conv: bool) -> Iterator[AdapterTarget]:
        return sd_adapter_targets(self.text_encoder, self.unet, conv)

    def kohya_models(self) -> KohyaModels:
        return KohyaModels(self.vae, *kohya_views(self.text_encoder, self.unet))

    def prompt_conds(self, prompt: str, negative_prompt: str) -> Conds:
        """Conditioning of prompt and negative prompt, [2, L, D]: as many chunks as the longer one needs, at most 3.

        Weights in prompts always count here, and the mean of the hidden states stays what it was, as in WebUIs.
        """
        prompts = [prompt, negative_prompt]
        num_tokens = max(len(clip.weighted_tokens(self.tokenizer, text)) for text in prompts)
        num_chunks = min(3, max(1, -(-num_tokens // clip.CHUNK)))
        ids, weights = clip.tokenize_weighted(self.tokenizer, prompts, num_chunks)
        hidden = self._hidden_states(ids)
        return {"hidden": clip.weighed_keeping_mean(hidden, weights.to(hidden))}

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] around [-1, 1] of scaled latents [B, 4, h, w]."""
        self.vae.to(self.device)
        return self.vae.decode((latents / self.latent_scale).to(self.vae_dtype)).sample

    def metadata(self) -> dict[str, str]:
        version = self.version
        architecture, resolution = version.v if self.v_prediction else version.epsilon
        return {
            "ss_v2": str(version.is_v2),
            "ss_base_model_version": version.base_model + ("_v" if self.v_prediction else ""),
            "modelspec.architecture": architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "v" if self.v_prediction else "epsilon",
            "modelspec.resolution": resolution,
        }


def sd_adapter_targets(text_encoder: CLIPTextModel, unet: UNet2DConditionModel, conv: bool) -> Iterator[AdapterTarget]:
    """The layers that kohya's networks adapt, under its names and in its order: text encoder, then U-Net.

    Without `conv` the U-Net's transformers (Linear and 1x1 convolutions); with it also residual blocks and samplers.
    """
    for name, layer in layers_inside(text_encoder, TEXT_CLASSES):
        yield AdapterTarget("lora_te_" + in_text_model(name).replace(".", "_"), layer, "te")
    for name, layer in layers_inside(unet, UNET_CLASSES + (UNET_CONV_CLASSES if conv else ())):
        yield AdapterTarget("lora_unet_" + name.replace(".", "_"), layer, "unet", unet_block(name), BLOCKS)


def kohya_views(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> tuple[nn.Module, nn.Module]:
    """Text encoder and U-Net under the module paths and class names that kohya's have."""
    return view_of(text_encoder, in_text_model, {}), view_of(unet, lambda path: path, KOHYA_UNET_CLASSES)


def in_text_model(path: str) -> str:
    """A module's path with the outermost level that transformers 5.6 dropped."""
    return path if path.partition(".")[0] == "text_model" else f"text_model.{path}"


def unet_block(name: str) -> int | None:
    """The block of a U-Net layer as kohya numbers them: 0 to 11 down, 12 the middle, 13 to 24 up.

    Residual block j and attention j of a diffusers block share a number, and a sampler has that of the last of three.
    Down, the numbers are those of LDM's `input_blocks`, where 0 is the first convolution and is not adapted; up, they
    are 13 more than those of its `output_blocks`.
    """
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
    if match is None:
        return BLOCKS.num_down if name.startswith("mid_block.") else None
    first = 1 if match[1] == "down" else BLOCKS.num_down + BLOCKS.num_mid
    return first + 3 * int(match[2]) + (2 if match[3].endswith("samplers") else int(match[4]))


def layers_inside(model: nn.Module, class_names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers (Linear, Conv2d) inside modules of the named classes, in kohya's order."""
    for parent_name, parent in model.named_modules():
        if type(parent).__name__ not in class_names:
            continue
        inside = [(n, m) for n, m in parent.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for name, layer in sorted(inside, key=lambda pair: transformer_position(pair[0])):
            yield f"{parent_name}.{name}", layer


def transformer_position(name: str) -> tuple[int, int, int]:
    """Where a layer of a Transformer2DModel stands in a kohya file; its feed-forward comes before cross-attention."""
    match = re.match(r"transformer_blocks\.(\d+)\.(attn1|ff|attn2)\.", name)
    if match:
        return 1, int(match[1]), ("attn1", "ff", "attn2").index(match[2])
    return (2 if name == "proj_out" else 0), 0, 0
