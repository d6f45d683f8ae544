"""What training needs to know of a model, whatever its family.

Shapes: B batch, C channels, H W pixels, h w latent cells, L tokens, D features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.dataset.share import Share
from library.families.blocks import BlockLayout
from library.families.parts import Hold, Part
from library.families.vae import Vae

Conds = dict[str, Tensor]  # text conditioning; only its family looks inside
Sizes = Sequence[tuple[int, ...]]  # (h, w) of the original, (top, left) of the crop, (h, w) of the picture, in pixels
Checkpoint = Callable[..., Any]  # runs a module on arguments so that its backward pass computes it again


@dataclass
class Batch:
    """What one training step sees of the dataset."""

    captions: list[str]
    loss_weights: Tensor  # [B]; prior_loss_weight for regularisation pictures, else 1
    images: Tensor | None  # [B, 3, H, W] in [-1, 1]; None where latents are cached
    latents: Tensor | None  # [B, C, h, w] as the VAE gives them, not scaled
    conds: Conds | None  # text encoder outputs as their files hold them; None where captions are to be encoded
    alpha_masks: Tensor | None  # [B, H, W] in [0, 1]
    original_sizes_hw: Tensor  # [B, 2] pixels
    crop_top_lefts: Tensor  # [B, 2] pixels
    target_sizes_hw: Tensor  # [B, 2] pixels
    preserved_rows: list[int] = field(default_factory=list)  # whose target is the model's output without the network
    share: Share | None = None  # what these rows are of the global batch; None outside of training
    pictures: list[str] = field(default_factory=list)  # their paths, where they are known; for messages
    left_out: list[str] = field(default_factory=list)  # what could not be read, and is missing, with the reasons

    def to(self, device: torch.device) -> "Batch":
        """The batch with its pictures, latents, masks and weights on the device; sizes stay where they are."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from without waiting; a DataLoader calls this."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = ("loss_weights", "images", "latents", "alpha_masks")
        changed = {name: change(value) for name in tensors if (value := getattr(self, name)) is not None}
        conds = self.conds and {name: change(value) for name, value in self.conds.items()}
        return replace(self, **changed, conds=conds)


@dataclass(frozen=True)
class AdapterTarget:
    """A layer that an adapter may change."""

    name: str  # prefix in the file: "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    layer: nn.Module  # the Linear or Conv2d
    part: str  # "unet", "te", "te1", "te2": what has its own learning rate
    block: int | None = None  # its block among those of `layout`, numbered as kohya does; None outside of all blocks
    layout: BlockLayout | None = None  # the blocks of the model; None where it has no numbered ones
    other_name: str | None = None  # its prefix in files of other programs
    input: str | None = None  # a name for what it reads, where other layers of its part read the same tensor beside it


@dataclass(frozen=True)
class KohyaModels:
    """The models as networks of other projects expect them: with kohya's module paths and class names."""

    vae: nn.Module
    text_encoder: nn.Module | list[nn.Module]  # a list where there are several
    unet: nn.Module


class ModelFamily(Protocol):
    """The questions training asks of a model; nothing else asks which family it has."""

    name: str  # "sd"; suffix of cache files
    device: torch.device
    dtype: torch.dtype  # of the frozen weights
    unet: nn.Module  # with its weights, which are read when it is first asked for; so are those of
    text_encoders: Sequence[nn.Module]
    vae: Vae
    v_prediction: bool
    trains_text_encoder: bool

    def conds(self, batch: Batch) -> Conds: ...

    def remember_text(self, captions: Sequence[str], progress: Callable[[], object]) -> bool:
        """Encode all captions there will be with frozen text encoders, which then leave the device.

        `progress` is called for each; False where they need too much memory, and nothing is changed then.
        """
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conds: Conds) -> Tensor: ...

    def adapter_targets(self, conv: bool, norms: bool = False) -> Iterator[AdapterTarget]:
        """The layers to adapt, which may still be without their weights, on the meta device; norms are the U-Net's."""
        ...

    def keep_weights(self) -> None:
        """Read the weights of U-Net and text encoders, and hold them: they will be changed, or looked at."""
        ...

    def change_layers(self, changes: Mapping[nn.Module, Callable[[], None]]) -> None:
        """Change layers of U-Net and text encoders, each as soon as its weights are there."""
        ...

    def hold_in(self, hold: Hold, text_too: bool) -> None:
        """Have the U-Net, or the text encoders too, rounded layer by layer as they are read, after all changes."""
        ...

    def kohya_models(self) -> KohyaModels: ...

    def swap_blocks(self, num_blocks: int) -> None:
        """Have the weights of the U-Net's largest blocks read to main memory; UserError where it has fewer blocks."""
        ...

    def enable_gradient_checkpointing(self, checkpoint: Checkpoint | None = None) -> None:
        """Recompute activations in the backward pass, those of the U-Net's blocks in the way given."""
        ...

    def prompt_conds(self, *prompts: str, sizes: Sizes | None = None) -> Conds:
        """Conditioning of texts with weights, a row each, for guidance.

        `sizes` are the six numbers of SDXL for each, where they are not those of a whole picture.
        """
        ...

    def metadata(self) -> dict[str, str]: ...


class StoresText(ModelFamily, Protocol):
    """A family with files of text encoder outputs, as its row of library.families.FAMILIES says."""

    text_encoder_parts: Sequence[Part]

    def stored_text(self, caption: str) -> Conds:
        """What the text encoders make of a caption, as a file holds it; `conds` takes batches of it."""
        ...
