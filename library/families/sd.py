"""Stable Diffusion 1.x and 2.x: what the model is made of, and how training asks it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from library.families import clip
from library.families.base import AdapterTarget, Batch, Checkpoint, Conds, KohyaModels, Sizes
from library.families.blocks import SD_BLOCKS, unet_block
from library.families.checkpoint_files import Target
from library.families.checkpoints import open_models
from library.families.detect import inspect_checkpoint
from library.families.kinds import SD_SCALE
from library.families.kohya_view import view_of
from library.families.modules import (
    KOHYA_UNET_CLASSES,
    checkpoint_gradients,
    in_text_model,
    shared_input,
    text_layers,
    unet_layers,
    unet_norms,
)
from library.families.parts import Hold
from library.families.text_memory import TextMemory
from library.families.vae import Vae
from library.options.groups import ModelOptions


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

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype):
        self.options, self.device, self.dtype = options, device, dtype
        self.v_prediction = options.v_parameterization
        checkpoint = inspect_checkpoint(options.pretrained_model_name_or_path)
        self.version = VERSIONS[checkpoint.kind]
        self.tokenizer = clip.build_tokenizer(self.version.pad_token)
        self.parts = open_models(checkpoint, options)
        self.vae = Vae(self.parts.vae, SD_SCALE, Target(torch.float32 if options.no_half_vae else dtype, device))
        self.trains_text_encoder = False
        self._memory = TextMemory(self._encode_one, self.parts.text_encoders, device, dtype)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.parts.unet.loaded(Target(self.dtype, self.device))

    @property
    def text_encoders(self) -> tuple[CLIPTextModel]:
        return (self.text_encoder,)

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.parts.text_encoders[0].loaded(Target(self.dtype, self.device))

    @property
    def num_chunks(self) -> int:
        """Passes of 75 tokens that a caption gets."""
        return (self.options.max_token_length or clip.CHUNK) // clip.CHUNK

    def swap_blocks(self, num_blocks: int) -> None:
        self.parts.swap_blocks(num_blocks)

    def enable_gradient_checkpointing(self, checkpoint: Checkpoint | None = None) -> None:
        checkpoint_gradients(self.unet, self.text_encoders if self.trains_text_encoder else (), checkpoint)

    def conds(self, batch: Batch) -> Conds:
        if self.trains_text_encoder:
            return {"hidden": self.encode_text(batch.captions)}
        return self._memory.conds(batch.captions)

    def remember_text(self, captions: Sequence[str], progress: Callable[[], object]) -> bool:
        return self._memory.fill(captions, progress)

    def encode_text(self, captions: list[str]) -> Tensor:
        """Hidden states [B, L, D] of captions, L = 75 num_chunks + 2; with --weighted_captions times their weights."""
        if self.options.weighted_captions:
            ids, weights = clip.tokenize_weighted(self.tokenizer, captions, self.num_chunks)
            hidden = self._hidden_states(ids)
            return hidden * weights.to(hidden, non_blocking=True)
        return self._hidden_states(clip.tokenize(self.tokenizer, captions, self.num_chunks))

    def prompt_conds(self, *prompts: str, sizes: Sizes | None = None) -> Conds:
        """Conditioning of texts, [B, L, D]: as many chunks as the longest needs, at most 3; sizes have no meaning.

        Weights in prompts always count here, and the mean of the hidden states stays what it was, as in WebUIs.
        """
        num_chunks = clip.chunks_needed(self.tokenizer, prompts)
        ids, weights = clip.tokenize_weighted(self.tokenizer, prompts, num_chunks)
        hidden = self._hidden_states(ids)
        return {"hidden": clip.weighed_keeping_mean(hidden, weights.to(hidden))}

    def _encode_one(self, caption: str) -> Conds:
        return {"hidden": self.encode_text([caption])[0]}

    def _hidden_states(self, ids: Tensor) -> Tensor:
        with self._memory.encoders_at_work():
            return clip.encode(self.text_encoder, ids.to(self.device, non_blocking=True), self.options.clip_skip)

    def predict(self, noisy: Tensor, timesteps: Tensor, conds: Conds) -> Tensor:
        return self.unet(noisy.to(self.dtype), timesteps, conds["hidden"].to(self.dtype), return_dict=False)[0]

    def adapter_targets(self, conv: bool, norms: bool = False) -> Iterator[AdapterTarget]:
        return sd_adapter_targets(self.parts.text_encoders[0].layers, self.parts.unet.layers, conv, norms)

    def keep_weights(self) -> None:
        self.parts.keep_weights(Target(self.dtype, self.device))

    def change_layers(self, changes: Mapping[nn.Module, Callable[[], None]]) -> None:
        self.parts.change_layers(changes)

    def hold_in(self, hold: Hold, text_too: bool) -> None:
        self.parts.hold_in(hold, text_too)

    def kohya_models(self) -> KohyaModels:
        self.keep_weights()
        return KohyaModels(self.parts.vae.layers, *kohya_views(self.text_encoder, self.unet))

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


def sd_adapter_targets(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel, conv: bool, norms: bool = False
) -> Iterator[AdapterTarget]:
    """The layers that kohya's networks adapt, under its names and in its order: text encoder, U-Net; then norms."""
    for path, layer in text_layers(text_encoder):
        yield AdapterTarget(f"lora_te_{path}".replace(".", "_"), layer, "te", input=shared_input(path))
    for path, layer in unet_layers(unet, conv):
        name, block = f"lora_unet_{path}".replace(".", "_"), unet_block(path)
        yield AdapterTarget(name, layer, "unet", block, SD_BLOCKS, input=shared_input(path))
    for path, norm in unet_norms(unet) if norms else ():
        yield AdapterTarget(f"lora_unet_{path}".replace(".", "_"), norm, "unet", unet_block(path), SD_BLOCKS)


def kohya_views(text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> tuple[nn.Module, nn.Module]:
    """Text encoder and U-Net under the module paths and class names that kohya's have."""
    return view_of(text_encoder, in_text_model, {}), view_of(unet, lambda path: path, KOHYA_UNET_CLASSES)
