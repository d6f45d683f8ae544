"""A frozen model whose Linear layers multiply in int8 (--base_quantization int8): weights and activations of 8 bits.

A weight has a scale for each output, an input one for each token, and so has the gradient, which takes the weight's
scales in before it is rounded; both products are sums of int8 in int32 (as in arXiv:2208.07339, without outliers).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer
from library.layers.norms import dtype_behind

LARGEST = 127
SMALLEST = torch.finfo(torch.float32).tiny  # so that zeros are divided by something
FEWEST_ROWS, MULTIPLE = 17, 8  # what CUDA's product of int8 matrices asks of their sizes


def hold_in_int8(model: nn.Module) -> None:
    """Store the weights of a frozen model's Linear layers in int8, where their sizes allow the product.

    Call this before adapters are attached, and after everything that is merged into the weights.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
            weight = layer.weight.detach()
            del layer.weight
            stored, scale = rounded(weight)
            layer.compute_dtype = weight.dtype
            layer.stored, layer.scale = (nn.Parameter(value, requires_grad=False) for value in (stored, scale))
            layer.__class__ = Linear


class Linear(FrozenLayer, nn.Linear):
    """It is called as the layer that it stands for, since networks may look for the name."""

    stored: Tensor  # [out, in] int8
    scale: Tensor  # [out, 1] fp32
    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """What it computes with, made anew at each use."""
        return (self.stored * self.scale).to(self.compute_dtype)

    def output(self, x: Tensor) -> Tensor:
        dtype, rows = dtype_behind(x), x.reshape(-1, self.in_features)
        if len(rows) < FEWEST_ROWS:
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias)
        result = product(*rounded(rows), self.stored.t()).mul_(self.scale.view(-1))
        if self.bias is not None:
            result += self.bias
        return result.to(dtype).view(*x.shape[:-1], self.out_features)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        rows = gradient.reshape(-1, self.out_features)
        if len(rows) < FEWEST_ROWS:
            return gradient @ self.weight.to(gradient.dtype)
        return product(*rounded(rows * self.scale.view(-1)), self.stored).to(gradient.dtype).view(shape)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in int8, and what each of its rows [n, 1] was divided by, in fp32."""
    scale = (rows.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST)
    return (rows / scale).round_().to(torch.int8), scale


def product(rows: Tensor, scale: Tensor, other: Tensor) -> Tensor:
    """(scale rows) other, in fp32."""
    return torch._int_mm(rows, other) * scale
