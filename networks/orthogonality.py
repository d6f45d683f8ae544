"""How far matrices are from being orthonormal, as one function: two small products for each of them.

The sum of |M M^T - 1|^2 over matrices M [rank, n] (arXiv:2303.10512, eq. 4, which has P as P^T). All have one device.
"""

import torch
from torch import Tensor


class Orthogonality(torch.autograd.Function):
    """`apply(*matrices)`; a scalar."""

    @staticmethod
    def forward(ctx, *matrices: Tensor) -> Tensor:
        grams = [torch.mm(matrix, matrix.T) for matrix in map(Tensor.float, matrices)]
        torch._foreach_sub_([gram.diagonal() for gram in grams], 1.0)
        ctx.save_for_backward(*matrices, *grams)
        return torch.stack(torch._foreach_norm(grams)).square().sum()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        count = len(saved) // 2
        return tuple(
            (4 * gradient * (gram @ matrix.float())).to(matrix.dtype)
            for matrix, gram in zip(saved[:count], saved[count:], strict=True)
        )
