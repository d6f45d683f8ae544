"""Blocks of a frozen U-Net whose weights wait in main memory and are on the device while the block is at work alone.

A block's weights come before its forward pass and again before its backward pass, while the block before it computes,
and go after each. What is copied never changes, so nothing is copied back. Adapters and all that is small, such as
norms and biases, stay on the device.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.layers.frozen import FrozenLayer

logger = logging.getLogger(__name__)

BLOCKS = "BasicTransformerBlock", "ResnetBlock2D"


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The blocks that can wait, by their paths: nearly all weights are in them."""
    return {path: module for path, module in unet.named_modules() if type(module).__name__ in BLOCKS}


def largest_blocks(unet: nn.Module, num_blocks: int) -> dict[str, nn.Module]:
    """The blocks with the most weights, of those with as many the first, by their paths."""
    largest = sorted(blocks_of(unet).items(), key=lambda item: -sum(value.numel() for value in weights_of(item[1])))
    return dict(largest[:num_blocks])


def weights_of(block: nn.Module) -> list[nn.Parameter]:
    """Those that wait: the matrices of the block's frozen layers, in whatever form these hold them."""
    layers = [layer for layer in block.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return [parameter for parameter in parameters if parameter.ndim > 1 and not parameter.requires_grad]


class Linear(FrozenLayer, nn.Linear):
    """A Linear layer whose backward pass takes the weights that are there by then; autograd would keep them there."""

    def output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ self.weight.to(gradient.dtype)


class Arrival(NamedTuple):
    """Weights on the device, and what tells when they are whole; None where they are already."""

    weights: list[Tensor]
    event: "torch.cuda.Event | None" = None


class Mover:
    """Copies between main memory and a device, one after the other."""

    def __init__(self, device: torch.device):
        self.device = device

    def to_main_memory(self, weight: Tensor) -> Tensor:
        """The weights to keep; on the meta device a tensor of their shape that counts as no memory."""
        return stub(weight.shape, weight.dtype) if self.device.type == "meta" else weight.cpu()

    def fetch(self, kept: Sequence[Tensor]) -> Arrival:
        """New copies on the device."""
        arriving = [torch.empty(value.shape, dtype=value.dtype, device=self.device) for value in kept]
        for new, value in zip(arriving, kept, strict=True):
            new.copy_(value, non_blocking=True)
        return Arrival(arriving)

    def wait(self, arrival: Arrival) -> None:
        """Let what the device does next begin when the weights are whole."""


class CudaMover(Mover):
    """Copies beside what the GPU computes, from pinned memory."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.pins = True

    def to_main_memory(self, weight: Tensor) -> Tensor:
        if self.pins:
            try:
                return weight.cpu().pin_memory()
            except RuntimeError as error:
                self.pins = False
                reason = str(error).partition("\n")[0]
                logger.warning("--blocks_to_swap: main memory cannot be pinned, so copies are slower (%s)", reason)
        return weight.to("cpu", copy=True)  # it may be a part of a file, which would be read anew each time

    def fetch(self, kept: Sequence[Tensor]) -> Arrival:
        """New copies, in memory that the stream that computes gives and gets back."""
        arriving = [torch.empty(value.shape, dtype=value.dtype, device=self.device) for value in kept]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may be at work with that memory
        with torch.cuda.stream(self.stream):
            for new, value in zip(arriving, kept, strict=True):
                new.copy_(value, non_blocking=True)
            return Arrival(arriving, self.stream.record_event())

    def wait(self, arrival: Arrival) -> None:
        torch.cuda.current_stream(self.device).wait_event(arrival.event)


def stub(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the meta device that stands for one in main memory: of one element, however large it seems."""
    return torch.empty((), dtype=dtype, device="meta").expand(*shape)


class SwappedBlock:
    """A block's weights: where they are, and where they are kept."""

    def __init__(self, block: nn.Module, mover: Mover):
        self.weights = weights_of(block)
        self.kept = []
        for weight in self.weights:
            self.kept.append(mover.to_main_memory(weight.detach()))
            weight.data = self.kept[-1]  # one at a time, so that not all are there twice
        for layer in block.modules():
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                layer.__class__ = Linear

    def point_to(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.data = value

    @property
    def num_bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.weights)


class SwappedBlocks:
    """Moves the weights of blocks as the U-Net runs; of at most two blocks are they on the device at any time.

    Which block comes next is what came next in the pass before. A block may run a second time in its backward pass, as
    --gradient_checkpointing has it do. One whose backward pass is over goes when that of the next one begins: autograd
    takes what is ready in the order of the forward pass, the last first, so nothing of it is left by then.
    """

    def __init__(self, unet: nn.Module, blocks: Iterable[nn.Module], mover: Mover):
        self.mover = mover
        self.blocks: list[SwappedBlock] = []
        self.present: dict[int, Arrival] = {}
        self.next_of: dict[int, int] = {}  # as the forward pass runs
        self.last: int | None = None  # that ran
        self.to_come: list[int] = []  # blocks that have a backward pass before them, the first to have it last
        self.in_backward: int | None = None
        unet.register_forward_pre_hook(lambda *_: self.begin())
        for index, block in enumerate(blocks):
            self.blocks.append(SwappedBlock(block, mover))
            block.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            block.register_forward_hook(lambda _block, _inputs, output, index=index: self.leave(index, output))

    def begin(self) -> None:
        """A forward pass of the whole model begins, whatever became of the one before."""
        self.last = self.in_backward = None
        self.to_come.clear()

    def enter(self, index: int) -> None:
        """Before a block's forward pass."""
        if self.in_backward == index:  # it runs again
            return
        if self.last is not None:
            self.next_of[self.last] = index
        self.last = index
        self.bring(index, self.next_of.get(index))

    def leave(self, index: int, output: Tensor) -> None:
        """After it; the last block stays, as its backward pass is the first."""
        if self.in_backward == index:
            return
        if output.requires_grad:
            self.to_come.append(index)
            output.register_hook(lambda _: self.enter_backward(index))
        if not output.requires_grad or index in self.next_of:
            self.send_away(index)

    def enter_backward(self, index: int) -> None:
        """When the gradient of a block's output is there."""
        while self.to_come and self.to_come.pop() != index:
            pass
        self.in_backward = index
        self.bring(index, self.to_come[-1] if self.to_come else None)

    def bring(self, index: int, following: int | None) -> None:
        """Have one block on the device and the next one on its way, and no other."""
        for other in self.present.keys() - {index, following}:
            self.send_away(other)
        for wanted in (index, following):
            if wanted is not None and wanted not in self.present:
                self.present[wanted] = self.mover.fetch(self.blocks[wanted].kept)
        self.mover.wait(self.present[index])
        self.blocks[index].point_to(self.present[index].weights)

    def send_away(self, index: int) -> None:
        """Let the copies on the device go."""
        self.mover.wait(self.present.pop(index))  # nothing else may get the memory before they are whole
        self.blocks[index].point_to(self.blocks[index].kept)
