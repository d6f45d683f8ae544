"""Training of a norm's weight and bias (`train_norm`), named w_norm and b_norm in files, as LyCORIS has them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.families.base import AdapterTarget
from networks.base import Adapter


def is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.GroupNorm, nn.LayerNorm))


def group_norm(x: Tensor, layer: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """A GroupNorm with other weights. PyTorch's backward pass on a CPU crashes where x [N, C, H, W] has no gradient."""
    if x.requires_grad or not torch.is_grad_enabled():
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    normal = F.group_norm(x, layer.num_groups, None, None, layer.eps)
    return normal * weight[:, None, None] + bias[:, None, None]


class NormAdapter(Adapter):
    """What is added to weight and bias."""

    def __init__(self, target: AdapterTarget):
        super().__init__(target, None)
        size = target.layer.weight.shape
        self.w_norm, self.b_norm = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.multiplier == 0:
            return self.base_output(x)
        layer = self.base
        weight, bias = (
            (base.float() + self.multiplier * change).to(base.dtype)
            for base, change in ((layer.weight, self.w_norm), (layer.bias, self.b_norm))
        )
        if isinstance(layer, nn.GroupNorm):
            return group_norm(x, layer, weight, bias)
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)

    def delta_weight(self) -> Tensor:
        return self.w_norm

    def rescale(self, factor: Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(factor)

    @torch.no_grad()
    def merge(self, multiplier: float = 1.0) -> None:
        super().merge(multiplier)
        self.base.bias.add_(multiplier * self.b_norm.to(self.base.bias))
