"""Stable Diffusion XL (arXiv:2307.01952): two text encoders, and sizes as conditioning."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from library.families import clip
from library.families.base import AdapterTarget, Batch, Checkpoint, Conds, KohyaModels, Sizes
from library.families.blocks import BlockLayout
from library.families.checkpoint_files import Target
from library.families.checkpoints import open_models
from library.families.detect import inspect_checkpoint
from library.families.kinds import SDXL_SCALE
from library.families.kohya_view import view_of
from library.families.ldm_unet import ldm_paths
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

PAD_TOKENS = "<|endoftext|>", "!"  # of CLIP and of OpenCLIP
BLOCKS = BlockLayout(num_down=9, num_mid=3, num_up=9, num_before=1, num_after=1)
FIRST_BLOCK = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}  # by its name in LDM's layout


class Sdxl:
    """U-Net, VAE, both text encoders and tokenizers of an SDXL base checkpoint."""

    name = "sdxl"

    def __init__(self, options: ModelOptions, device: torch.device, dtype: torch.dtype):
        self.options, self.device, self.dtype = options, device, dtype
        self.v_prediction = options.v_parameterization
        self.tokenizers = [clip.build_tokenizer(token) for token in PAD_TOKENS]
        checkpoint = inspect_checkpoint(options.pretrained_model_name_or_path)
        self.parts = open_models(checkpoint, options)
        self.vae = Vae(self.parts.vae, SDXL_SCALE, Target(torch.float32 if options.no_half_vae else dtype, device))
        self.text_encoder_parts = self.parts.text_encoders
        self.trains_text_encoder = False
        self._memory = TextMemory(self._encode_one, self.parts.text_encoders, device, dtype)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.parts.unet.loaded(Target(self.dtype, self.device))

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        return tuple(part.loaded(Target(self.dtype, self.device)) for part in self.parts.text_encoders)

    @property
    def num_chunks(self) -> int:
        """Passes of 75 tokens that a caption gets."""
        return (self.options.max_token_length or clip.CHUNK) // clip.CHUNK

    def swap_blocks(self, num_blocks: int) -> None:
        self.parts.swap_blocks(num_blocks)

    def enable_gradient_checkpointing(self, checkpoint: Checkpoint | None = None) -> None:
        checkpoint_gradients(self.unet, self.text_encoders if self.trains_text_encoder else (), checkpoint)

    def conds(self, batch: Batch) -> Conds:
        return self._text_conds(batch) | {"sizes": size_conditions(batch).to(self.device, non_blocking=True)}

    def _text_conds(self, batch: Batch) -> Conds:
        if batch.conds is not None:
            stored = {name: value.to(self.device, self.dtype) for name, value in batch.conds.items()}
            hidden = torch.cat([stored["hidden_state1"], stored["hidden_state2"]], dim=-1)
            return {"hidden": hidden, "pooled": stored["pool2"]}
        return self.encode_text(batch.captions) if self.trains_text_encoder else self._memory.conds(batch.captions)

    def stored_text(self, caption: str) -> Conds:
        """Under kohya's names: the hidden states of each encoder, [L, D1] and [L, D2], and pooled text [P]."""
        conds = self._memory.encoded(caption)
        width = self.parts.text_encoders[0].layers.config.hidden_size
        hidden = conds["hidden"]
        return {"hidden_state1": hidden[:, :width], "hidden_state2": hidden[:, width:], "pool2": conds["pooled"]}

    def remember_text(self, captions: Sequence[str], progress: Callable[[], object]) -> bool:
        return self._memory.fill(captions, progress)

    def encode_text(self, captions: list[str]) -> Conds:
        """Hidden states [B, L, D1 + D2] of both encoders, L = 75 num_chunks + 2, and pooled text [B, P] of the second.

        With --weighted_captions the hidden states are multiplied by the captions' weights.
        """
        if self.options.weighted_captions:
            return self._weighted(captions, self.num_chunks, torch.mul)
        return self._conds([clip.tokenize(tokenizer, captions, self.num_chunks) for tokenizer in self.tokenizers])

    def prompt_conds(self, *prompts: str, sizes: Sizes | None = None) -> Conds:
        """Conditioning of texts and, where given, sizes: as many chunks as the longest text needs, at most 3.

        Weights in prompts always count here, and the mean of the hidden states stays what it was, as in WebUIs.
        """
        num_chunks = clip.chunks_needed(self.tokenizers[0], prompts)
        conds = self._weighted(prompts, num_chunks, clip.weighed_keeping_mean)
        return conds if sizes is None else conds | {"sizes": torch.tensor(sizes, dtype=torch.float32).to(self.device)}

    def _weighted(self, texts: Sequence[str], num_chunks: int, weigh: Callable[[Tensor, Tensor], Tensor]) -> Conds:
        """The conditioning of texts with weights, which `weigh` applies to the hidden states of each encoder."""
        pairs = [clip.tokenize_weighted(tokenizer, texts, num_chunks) for tokenizer in self.tokenizers]
        return self._conds(
            [ids for ids, _ in pairs],
            lambda number, hidden: weigh(hidden, pairs[number][1].to(hidden, non_blocking=True)),
        )

    def _conds(self, ids: list[Tensor], change: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden) -> Conds:
        """The conditioning of each encoder's token ids [B, n, 77], with a change of its hidden states."""
        with self._memory.encoders_at_work():
            states = [
                clip.encode_penultimate(encoder, of_one.to(self.device, non_blocking=True))
                for encoder, of_one in zip(self.text_encoders, ids, strict=True)
            ]
        hidden = [change(number, state) for number, (state, _) in enumerate(states)]
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": states[-1][1]}

    def _encode_one(self, caption: str) -> Conds:
        return {name: value[0] for name, value in self.encode_text([caption]).items()}

    def predict(self, noisy: Tensor, timesteps: Tensor, conds: Conds) -> Tensor:
        sizes = conds["sizes"] if "sizes" in conds else whole_pictures(noisy)
        noisy, hidden, pooled = (value.to(self.dtype) for value in (noisy, conds["hidden"], conds["pooled"]))
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]

    def adapter_targets(self, conv: bool, norms: bool = False) -> Iterator[AdapterTarget]:
        text_encoders = [part.layers for part in self.parts.text_encoders]
        return sdxl_adapter_targets(text_encoders, self.parts.unet.layers, conv, norms)

    def keep_weights(self) -> None:
        self.parts.keep_weights(Target(self.dtype, self.device))

    def change_layers(self, changes: Mapping[nn.Module, Callable[[], None]]) -> None:
        self.parts.change_layers(changes)

    def hold_in(self, hold: Hold, text_too: bool) -> None:
        self.parts.hold_in(hold, text_too)

    def kohya_models(self) -> KohyaModels:
        self.keep_weights()
        texts = [view_of(encoder, in_text_model, {}) for encoder in self.text_encoders]
        return KohyaModels(self.parts.vae.layers, texts, view_of(self.unet, ldm_paths(self.unet), KOHYA_UNET_CLASSES))

    def metadata(self) -> dict[str, str]:
        return {
            "ss_v2": "False",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.prediction_type": "v" if self.v_prediction else "epsilon",
            "modelspec.resolution": "1024x1024",
        }


def size_conditions(batch: Batch) -> Tensor:
    """Original size, crop and target size [B, 6] in pixels (h, w, top, left, h, w)."""
    return torch.cat([batch.original_sizes_hw, batch.crop_top_lefts, batch.target_sizes_hw], dim=1).float()


def whole_pictures(noisy: Tensor) -> Tensor:
    """The same for pictures that were made in the size of these latents [B, 4, h, w]."""
    height, width = (8 * side for side in noisy.shape[-2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=noisy.device)
    return sizes.expand(len(noisy), -1)


def sdxl_adapter_targets(
    text_encoders: Sequence[nn.Module], unet: UNet2DConditionModel, conv: bool, norms: bool = False
) -> Iterator[AdapterTarget]:
    """The layers that kohya's networks adapt, under its names and in its order: text encoders, then U-Net.

    The U-Net's layers have their paths in LDM's layout. Files made by diffusers have its own paths instead.
    """
    for number, text_encoder in enumerate(text_encoders, start=1):
        for path, layer in text_layers(text_encoder):
            name = f"lora_te{number}_{path}".replace(".", "_")
            yield AdapterTarget(name, layer, f"te{number}", input=shared_input(path))
    ldm_path = ldm_paths(unet)
    layers = [(ldm_path(path), path, layer) for path, layer in unet_layers(unet, conv)]
    for path, diffusers_path, layer in sorted(layers, key=lambda item: unet_position(item[0])):
        name, other = (f"lora_unet_{text}".replace(".", "_") for text in (path, diffusers_path))
        block = unet_position(path)[0]
        yield AdapterTarget(name, layer, "unet", block, BLOCKS, other_name=other, input=shared_input(path))
    for diffusers_path, norm in unet_norms(unet) if norms else ():
        path = ldm_path(diffusers_path)
        name, other = (f"lora_unet_{text}".replace(".", "_") for text in (path, diffusers_path))
        yield AdapterTarget(name, norm, "unet", unet_position(path)[0], BLOCKS, other_name=other)


def unet_position(path: str) -> tuple[int, int]:
    """A layer's block as kohya numbers them, and its place there; of equal ones the order stays as it is.

    1 to 9 are LDM's input blocks, 10 to 12 the middle, 13 to 21 the output blocks.
    """
    part, number, place = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.", path).groups()
    return FIRST_BLOCK[part] + int(number), int(place or 0)
