"""Frozen layers whose weights lie in fewer bits and are converted where they are used, and only while they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer, conv2d_input_gradient


class Converted(FrozenLayer):
    """A layer that computes in the format its weight had. Subclasses say how it is stored, beside its bias.

    The layers below are called as those that they stand for, since networks may look for these names.
    """

    compute_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """What it computes with, made anew at each use."""
        return self.weight_in(self.compute_dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in this format, in new memory."""
        raise NotImplementedError


class Linear(Converted, nn.Linear):
    def output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ self.weight_in(gradient.dtype)


class Conv2d(Converted, nn.Conv2d):
    def output(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input_gradient(self, self.weight_in(gradient.dtype), gradient, shape)
