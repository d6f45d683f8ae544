"""The blocks of a frozen U-Net of diffusers, which keep for the backward pass what is dear to make again, and no more.

Kept are sums, and what products of matrices, convolutions and attention give; what norms, SiLU and GEGLU give is made
again. Values and gradients are those of diffusers' own blocks, which stay where a block is of another form.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from diffusers.models import attention, resnet, transformers
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer, conv2d_input_gradient, is_adapted
from library.layers.geglu import geglu
from library.layers.kernels import Kernels
from library.layers.made_again import MadeAgain
from library.layers.norms import group_norm, layer_norm


def keep_little(unet: nn.Module) -> None:
    """Make the blocks of a frozen U-Net those of this file; adapters may be attached before or later."""
    for module in unet.modules():
        is_usual, ours = BLOCKS.get(type(module), (None, None))
        if ours and is_usual(module):
            module.__class__ = ours
    last = unet.conv_norm_out
    if is_usual_norm(last) and not is_adapted(last) and isinstance(unet.conv_act, nn.SiLU):
        unet.conv_norm_out.__class__, unet.conv_act = GroupNormSilu, nn.Identity()


def keep_inputs(unet: nn.Module) -> None:
    """Have layers keep their inputs after all, as they must inside of blocks that run again as a whole."""
    for module in unet.modules():
        if isinstance(module, KeepsLittle):
            module.makes_inputs_again = False


def use_kernels(unet: nn.Module, kernels: Kernels) -> None:
    """Have the blocks of this file compute norms and GEGLU by the kernels."""
    for module in unet.modules():
        if isinstance(module, (KeepsLittle, GroupNormSilu)):
            module.kernels = kernels


class KeepsLittle(nn.Module):
    """What the blocks share: norms before layers whose input is made again."""

    makes_inputs_again = True
    kernels: Kernels | None = None

    def normal(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, MadeAgain | None]:
        """What the norm makes of x, and how to make it again; adapters may have replaced the norm's `forward`."""
        if is_adapted(norm):
            return norm(x), None
        if isinstance(norm, nn.LayerNorm):
            return layer_norm(norm, x, self.makes_inputs_again)
        return group_norm(norm, x, False, self.makes_inputs_again, self.kernels)


def instead_of(tensor: Tensor, recipe: MadeAgain | None) -> AbstractContextManager:
    """A context in which layers do not keep the tensor, where it can be made again."""
    return recipe.instead_of(tensor) if recipe else nullcontext()


class ResnetBlock2D(KeepsLittle, resnet.ResnetBlock2D):
    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        hidden = self._convolved(self.norm1, self.conv1, input_tensor)
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self._convolved(self.norm2, self.conv2, hidden)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden

    def _convolved(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        if is_adapted(norm):
            return conv(F.silu(norm(x)))
        normal, recipe = group_norm(norm, x, True, self.makes_inputs_again and is_adapted(conv), self.kernels)
        with instead_of(normal, recipe):
            return conv(normal)


class Transformer2DModel(KeepsLittle, transformers.Transformer2DModel):
    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        normal, recipe = self.normal(self.norm, hidden_states)
        if self.use_linear_projection:
            normal, recipe = tokens_of(normal), recipe and recipe.then(tokens_of)
        with instead_of(normal, recipe):
            projected = self.proj_in(normal)
        tokens = projected if self.use_linear_projection else tokens_of(projected)
        return tokens, tokens.shape[-1]


class BasicTransformerBlock(KeepsLittle, attention.BasicTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        own = {"attention_mask": attention_mask}
        text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        more = cross_attention_kwargs or {}
        for norm, attend, inputs in ((self.norm1, self.attn1, own), (self.norm2, self.attn2, text)):
            normal, recipe = self.normal(norm, hidden_states)
            with instead_of(normal, recipe):
                hidden_states = attend(normal, **inputs, **more) + hidden_states
        return self._fed_forward(hidden_states) + hidden_states

    def _fed_forward(self, hidden_states: Tensor) -> Tensor:
        gate, _, out = self.ff.net
        normal, recipe = self.normal(self.norm3, hidden_states)
        with instead_of(normal, recipe):
            projected = gate.proj(normal)
        gated, recipe = geglu(projected, self.makes_inputs_again, self.kernels)
        with instead_of(gated, recipe):
            return out(gated)


class GroupNormSilu(nn.GroupNorm):
    kernels: Kernels | None = None

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(self, input, True, False, self.kernels)[0]


class Conv2d(FrozenLayer, nn.Conv2d):
    """A convolution that does not keep its input."""

    def output(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input_gradient(self, self.weight.to(gradient.dtype), gradient, shape)


def tokens_of(pictures: Tensor) -> Tensor:
    """[N, H W, C] of [N, C, H, W]."""
    return pictures.permute(0, 2, 3, 1).flatten(1, 2)


def is_usual_convolution(conv: nn.Conv2d) -> bool:
    """Others' networks may have taken its weight."""
    return hasattr(conv, "weight") and not conv.weight.requires_grad and conv.padding_mode == "zeros"


def is_usual_norm(norm: nn.Module | None) -> bool:
    known = type(norm) in (nn.GroupNorm, nn.LayerNorm)
    return known and norm.weight is not None and norm.bias is not None and not norm.weight.requires_grad


def is_usual_resnet(block: resnet.ResnetBlock2D) -> bool:
    return (
        is_usual_norm(block.norm1)
        and is_usual_norm(block.norm2)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


def is_usual_transformer(model: transformers.Transformer2DModel) -> bool:
    return model.is_input_continuous and is_usual_norm(model.norm)


def is_usual_block(block: attention.BasicTransformerBlock) -> bool:
    return (
        block.norm_type == "layer_norm"
        and all(map(is_usual_norm, (block.norm1, block.norm2, block.norm3)))
        and block.attn2 is not None
        and not block.only_cross_attention
        and not block.double_self_attention
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and isinstance(block.ff.net[0], GEGLU)
        and len(block.ff.net) == 3
        and block.ff.net[1].p == 0
    )


BLOCKS = {  # class -> whether one is of the form that ours is written for, and ours
    nn.Conv2d: (is_usual_convolution, Conv2d),
    resnet.ResnetBlock2D: (is_usual_resnet, ResnetBlock2D),
    transformers.Transformer2DModel: (is_usual_transformer, Transformer2DModel),
    attention.BasicTransformerBlock: (is_usual_block, BasicTransformerBlock),
}
