"""Frozen layers on an x86 processor as oneDNN's matrix products, where those are faster than PyTorch's own way.

PyTorch gives products in fp32 to MKL, which is slow on processors that are not Intel's, and orders the weights of a
convolution anew at every call, which takes longer than the convolution where it has many channels and few pixels. As
products of plain weights both are nearly as fast as with weights that are kept in oneDNN's own order, and take no more
memory. The numbers differ in rounding alone.
"""

import copy
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer, conv2d_input_gradient, is_adapted

logger = logging.getLogger(__name__)

KINDS = nn.Linear, nn.Conv2d
ROWS = 16  # of a convolution that are put in order at once; stays in the processor's cache
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the norm, from the plain layer's numbers


def compute_with_onednn(model: nn.Module) -> None:
    """Have the frozen Linear layers and convolutions of a model on the CPU computed so, where it works here.

    Layers whose `forward` or weight somebody replaced stay as they are: take adapters off before, and put them back
    behind it.
    """
    layers = [layer for layer in model.modules() if type(layer) in KINDS and hasattr(layer, "weight")]
    dtypes = {layer.weight.dtype for layer in layers}
    for dtype in dtypes & TOLERANCES.keys():
        with torch.random.fork_rng(devices=[]):
            problem = check(dtype)
        if problem:
            logger.warning("frozen layers are computed as PyTorch does, which is slower: %s", problem)
            return
    for layer in layers:
        if not is_adapted(layer) and layer.weight.dtype in TOLERANCES:
            convert(layer)


def convert(layer: nn.Module) -> None:
    """Change the class of a layer that can be computed so; the weights of a convolution get their channels last."""
    kind = kind_of(layer)
    if kind and not layer.weight.requires_grad:
        if kind is Conv2d:
            layer.weight.data = with_channels_last(layer.weight.data)
        layer.__class__ = kind


def with_channels_last(weight: Tensor) -> Tensor:
    """Weights [out, in, k, k] so, in their own memory where nothing else, such as a file, lies there.

    To map new memory for a whole model takes longer than to write it.
    """
    storage = weight.untyped_storage()
    if not (weight.is_contiguous() and storage.resizable() and storage.nbytes() == weight.nbytes):
        return weight.contiguous(memory_format=torch.channels_last)
    for some in weight.flatten(2).split(ROWS):
        some.copy_(some.mT.contiguous().view_as(some))
    return weight.view(len(weight), *weight.shape[2:], -1).movedim(-1, 1)


def kind_of(layer: nn.Module) -> type[FrozenLayer] | None:
    """The class for a layer; None where PyTorch's own is as good."""
    if isinstance(layer, nn.Linear):
        return Linear if layer.weight.dtype == torch.float32 else None  # in bf16 PyTorch takes oneDNN itself
    is_usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    if not is_usual or isinstance(layer.padding, str):
        return None
    is_pointwise = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)
    return PointwiseConv2d if is_pointwise else Conv2d


def check(dtype: torch.dtype) -> str | None:
    """What is wrong with these layers on this machine, found on small ones; None where all is well."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"the way through oneDNN is for x86 processors with AVX2, this one's is {capability}"
    try:
        for plain, shape in (
            (nn.Linear(32, 48), (2, 5, 32)),
            (nn.Conv2d(32, 48, 1), (2, 32, 4, 3)),
            (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 4, 3)),
            (nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 5, 4)),
        ):
            error = difference(plain.to(dtype).requires_grad_(False), torch.randn(shape).to(dtype))
            if not error < TOLERANCES[dtype]:
                return f"oneDNN's numbers for {plain} differ by {error:.0e}"
    except (RuntimeError, AttributeError, NotImplementedError) as problem:
        return f"this torch or processor has not what it takes ({str(problem).splitlines()[0][:100]})"
    return None


def difference(plain: nn.Module, x: Tensor) -> float:
    """The larger error of output and input gradient, relative to the plain layer's."""
    ours = copy.deepcopy(plain)
    convert(ours)
    results = []
    for layer in (ours, plain):
        given = x.clone().requires_grad_()
        output = layer(given)
        (gradient,) = torch.autograd.grad(output, given, output.detach())
        results.append((output.detach().float(), gradient.float()))
    return max(((mine - wanted).norm() / wanted.norm()).item() for mine, wanted in zip(*results, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the weight's format, as autocast computes it."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


class Linear(FrozenLayer, nn.Linear):
    product = staticmethod(linear)

    def output(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return linear(gradient, self.weight.t())


class PointwiseConv2d(FrozenLayer, nn.Conv2d):
    """A convolution of 1x1: a Linear layer over the channels."""

    def output(self, x: Tensor) -> Tensor:
        return linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return linear(gradient.movedim(1, -1), self.weight.flatten(1).t()).movedim(-1, 1)


class Conv2d(FrozenLayer, nn.Conv2d):
    """Where the pixels are fewer than the channels, the product of the weights and each pixel's surroundings.

    These are C k k numbers a pixel. Where the pixels are more, ordering the weights is the lesser work.
    """

    def output(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        size = [self._num_positions(axis, length) for axis, length in enumerate(x.shape[2:])]
        if not self._is_product(len(x), *size):
            return self._conv_forward(x, self.weight, self.bias)
        columns = self._surroundings(x, *size)  # [B h w, k k C]
        product = linear(self._matrix(), columns)  # [out, B h w]; the weights come first, since these are not ordered
        output = product.view(-1, len(x), *size).transpose(0, 1)
        return output if self.bias is None else output.add_(self.bias.view(-1, 1, 1))

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        batch, _, height, width = gradient.shape
        if not self._is_product(batch, height, width):
            return conv2d_input_gradient(self, self.weight, gradient, shape)
        columns = linear(gradient.movedim(1, -1), self._matrix().t())  # [B, h, w, k k C]
        columns = columns.view(batch, height, width, *self.kernel_size, -1)
        (top, left), (down, right) = self.padding, self.stride
        padded = columns.new_zeros(batch, shape[2] + 2 * top, shape[3] + 2 * left, shape[1], dtype=torch.float32)
        for row in range(self.kernel_size[0]):
            for column in range(self.kernel_size[1]):
                rows = slice(row, row + down * height, down)
                padded[:, rows, column : column + right * width : right] += columns[:, :, :, row, column]
        inner = padded[:, top : top + shape[2], left : left + shape[3]]
        return inner.to(gradient.dtype).movedim(-1, 1)

    def _num_positions(self, axis: int, length: int) -> int:
        return (length + 2 * self.padding[axis] - self.kernel_size[axis]) // self.stride[axis] + 1

    def _is_product(self, batch: int, height: int, width: int) -> bool:
        return batch * height * width < self.out_channels

    def _matrix(self) -> Tensor:
        """The weights as [out, k k C]; a view, as their channels are last."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)

    def _surroundings(self, x: Tensor, height: int, width: int) -> Tensor:
        """What each output pixel is made of, [B h w, k k C]."""
        (top, left), (down, right) = self.padding, self.stride
        padded = F.pad(x.movedim(1, -1), (0, 0, left, left, top, top))
        batch, _, _, channels = padded.shape
        image, row, column, channel = padded.stride()
        shape = batch, height, width, *self.kernel_size, channels
        steps = image, row * down, column * right, row, column, channel
        return padded.as_strided(shape, steps).reshape(batch * height * width, -1)
