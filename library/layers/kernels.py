"""What kernels offer that take the place of PyTorch's operations; `fused_kernels.py` has the only ones."""

from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """Results are those of PyTorch's operations but for rounding, computed in fp32."""

    def takes(self, x: Tensor) -> bool:
        """Whether they are written for such numbers."""

    def group_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, C, H, W], contiguous, normalised in `dtype`; mean and 1 / standard deviation [N, groups] in fp32."""

    def group_norm_gradient(
        self, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool
    ) -> Tensor:
        """The gradient of x, in its format; `gradient` is contiguous as x."""

    def geglu(self, x: Tensor) -> Tensor:
        """a gelu(b) [..., D] of x = (a, b) [..., 2 D], contiguous."""

    def geglu_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """The gradient of x; `gradient` [..., D] is contiguous."""
