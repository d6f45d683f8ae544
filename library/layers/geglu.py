"""GEGLU (arXiv:2002.05202), which keeps its input alone for the backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from library.layers.kernels import Kernels
from library.layers.made_again import MadeAgain, forget


def geglu(x: Tensor, again: bool, kernels: Kernels | None = None) -> tuple[Tensor, MadeAgain | None]:
    """a gelu(b) [..., D] of x = (a, b) [..., 2 D], and how to make it again where that is wanted."""
    if kernels and kernels.takes(x):
        x = x.contiguous()
        recipe = MadeAgain(lambda: kernels.geglu(x.detach())) if again else None
        return FusedGeglu.apply(x, kernels, recipe), recipe
    gelu = MadeAgain(lambda: F.gelu(x.detach().chunk(2, dim=-1)[1])) if again else None
    product = gelu and gelu.then(lambda made: made * x.detach().chunk(2, dim=-1)[0])
    return Geglu.apply(x, gelu, product), product


class FusedGeglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernels: Kernels, recipe: MadeAgain | None) -> Tensor:
        ctx.kernels, ctx.recipe = kernels, recipe
        ctx.save_for_backward(x)
        return kernels.geglu(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        forget(ctx)
        (x,) = ctx.saved_tensors
        return ctx.kernels.geglu_gradient(gradient.contiguous(), x), None, None


class Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gelu: MadeAgain | None, recipe: MadeAgain | None) -> Tensor:
        ctx.gelu, ctx.recipe = gelu, recipe
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        forget(ctx)
        (x,) = ctx.saved_tensors
        value, gate = x.chunk(2, dim=-1)
        gelu, ctx.gelu = ctx.gelu.value() if ctx.gelu else F.gelu(gate), None
        of_x = torch.empty_like(x)
        of_value, of_gate = of_x.chunk(2, dim=-1)
        torch.mul(gradient, gelu, out=of_value)
        del gelu
        torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return of_x, None, None
