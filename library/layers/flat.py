"""All weights that are trained in one buffer, and their gradients in another, so that a step is a few operations.

A parameter stays what it was, with its name and shape, and becomes a view. Layers compute with a copy of the buffer in
the dtype of the model, made once a step, and add to a buffer of gradients of that dtype; where that is the dtype of
the parameters, both are the same memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements; a matrix that begins at a multiple of 128 bytes is read fastest


@dataclass(kw_only=True)
class Sink:
    """Whether gradients of a layer ever came to the buffers."""

    was_used: bool = False  # whether a backward pass ever came by
    first_uses: list["Sink"] = field(default_factory=list, repr=False)  # those of all layers, as they come

    def mark(self) -> None:
        """A backward pass comes by."""
        if not self.was_used:
            self.was_used = True
            self.first_uses.append(self)


@dataclass
class GradientSink(Sink):
    """Where a layer's backward pass adds the gradients of its two matrices, past autograd: parts of the buffers."""

    down: Tensor | None  # none where that matrix is frozen
    up: Tensor


class Collected(torch.autograd.Function):
    """`apply(anchor, sink, gradients, *values)`: the values, whose gradients are added to these tensors.

    So autograd differentiates what a layer makes of its parameters, and still leaves the gradients in the buffers. The
    anchor is any tensor that asks for gradients, so that autograd comes by.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, sink: Sink, gradients: Sequence[Tensor], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.sink, ctx.gradients = sink, gradients
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[None, ...]:
        for to, gradient in zip(ctx.gradients, gradients, strict=True):
            to.add_(gradient)
        ctx.sink.mark()
        return (None,) * (3 + len(gradients))


@dataclass(frozen=True)
class Span:
    """Where one parameter lies in the buffers."""

    parameter: nn.Parameter
    start: int
    sink: Sink

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    @property
    def padded_stop(self) -> int:
        return self.start + padded(self.parameter)

    def of(self, buffer: Tensor) -> Tensor:
        """The parameter's part of a buffer, in its shape."""
        return buffer[self.start : self.stop].view(self.parameter.shape)


class FlatWeights:
    """Buffers for the parameters of adapters, in the order of `parameters`."""

    def __init__(self, adapters: Sequence, parameters: Sequence[nn.Parameter], dtype: torch.dtype):
        starts = [0, *accumulate(padded(parameter) for parameter in parameters)]
        first = parameters[0]
        self.values = torch.zeros(starts[-1], dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        self.is_one_dtype = first.dtype == dtype
        self.computed = self.values if self.is_one_dtype else torch.zeros_like(self.values, dtype=dtype)
        self.collected = self.gradients if self.is_one_dtype else torch.zeros_like(self.computed)
        self.first_uses: list[Sink] = []  # grows where a layer has its first gradients
        start_of = dict(zip(map(id, parameters), starts, strict=False))
        spans = [span for adapter in adapters for span in self._taken(adapter, start_of)]
        self.spans = sorted(spans, key=lambda span: span.start)

    def _taken(self, adapter, start_of: dict[int, int]) -> list[Span]:
        """Let the adapter's parameters be views, and compute with views."""
        places = [(parameter, start_of[id(parameter)]) for parameter in adapter.flat_parameters()]
        computed, collected = (
            [buffer[start : start + p.numel()].view(p.shape) for p, start in places]
            for buffer in (self.computed, self.collected)
        )
        sink = adapter.use_flat(computed, collected)
        sink.first_uses = self.first_uses
        spans = [Span(parameter, start, sink) for parameter, start in places]
        for span in spans:
            view = span.of(self.values)
            view.copy_(span.parameter.detach())
            span.parameter.data = view
        return spans

    def refresh(self) -> None:
        """At the beginning of a step: follow the parameters."""
        if not self.is_one_dtype:
            self.computed.copy_(self.values)

    def collect(self) -> None:
        """After each backward pass: add what layers gave to the gradients of the step."""
        if not self.is_one_dtype:
            self.gradients.add_(self.collected)
            self.collected.zero_()

    def num_bytes(self) -> int:
        """What the buffers take."""
        buffers = {id(buffer): buffer for buffer in (self.values, self.gradients, self.computed, self.collected)}
        return sum(buffer.nbytes for buffer in buffers.values())

    def used(self) -> list[Span]:
        """The parameters that ever had a gradient."""
        return [span for span in self.spans if span.sink.was_used]


def padded(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def flat_weights(adapters: Iterable, groups: Sequence[dict], dtype: torch.dtype) -> FlatWeights | None:
    """The parameters of optimizer groups in buffers, for layers that compute in `dtype`; None where that cannot be.

    In each group those that read a layer's input come first, so that the ones of neighbours are one matrix.
    """
    side = {}  # by parameter
    able = []
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for adapter in adapters:
        own = [id(parameter) for parameter in adapter.flat_parameters()]
        if own and trained.issuperset(own):
            able.append(adapter)
            side |= {parameter: number for number, parameter in enumerate(own)}
    parameters = [p for group in groups for p in sorted(group["params"], key=lambda p: side.get(id(p), 0))]
    is_uniform = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
    return FlatWeights(able, parameters, dtype) if side.keys() == trained and is_uniform else None


def joined(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices of one shape that lie one behind the other, as one [sum of rows, columns]; None where they do not."""
    first, size = matrices[0], matrices[0].numel()
    places = [matrix.data_ptr() - first.data_ptr() for matrix in matrices]
    if {matrix.shape for matrix in matrices} != {first.shape} or size % ALIGNMENT:
        return None
    if places != [number * size * first.element_size() for number in range(len(matrices))]:
        return None
    return first.as_strided((len(matrices) * len(first), first.shape[1]), (first.shape[1], 1))
