"""What a training step needs of a GPU's memory, found without a GPU: the step runs on tensors that have no values.

On PyTorch's meta device every tensor has its size and its lifetime, but no data. Counted are the tensors alone: not the
roughly 0.5 GiB of the CUDA context, nor the workspaces of kernels, nor what the allocator loses to fragmentation.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What CUDA's autocast runs in the lower precision, and what it runs in fp32, of the functions that these models call.
LOWER = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)
FP32 = (F.layer_norm, F.group_norm, F.softmax, Tensor.softmax, F.mse_loss, torch.exp, torch.pow, Tensor.pow)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live on a device while it is entered, and the most there were."""

    def __init__(self, device_type: str = "meta"):
        super().__init__()
        self.device_type = device_type
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # by storage
        self._placeholders: set[int] = set()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self.device_type:
                self.note(value)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._placeholders:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def note_all(self, model: nn.Module) -> None:
        """Count the weights of a model that is older than this."""
        for value in itertools.chain(model.parameters(), model.buffers()):
            self.note(value)

    def ignore(self, model: nn.Module) -> None:
        """Do not count the weights that a model has now: they stand for some that are still to be read."""
        for value in itertools.chain(model.parameters(), model.buffers()):
            storage = value.untyped_storage()
            self._placeholders.add(storage._cdata)
            weakref.finalize(storage, self._placeholders.discard, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class LikeCuda(TorchFunctionMode):
    """Autocast's number formats and fused attention as a GPU has them, for tensors of any device."""

    def __init__(self, autocast: torch.dtype | None):
        super().__init__()
        self.autocast = autocast  # None where --mixed_precision is no
        self._casts: list[Tensor] = []  # autocast keeps those of trained weights until it is left

    def __enter__(self) -> "LikeCuda":
        self._asked = torch.is_autocast_enabled, torch.get_autocast_dtype
        torch.is_autocast_enabled = lambda *_: self.autocast is not None
        torch.get_autocast_dtype = lambda _: self.autocast or torch.bfloat16
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.is_autocast_enabled, torch.get_autocast_dtype = self._asked
        super().__exit__(*raised)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.cpu:  # there are no values to move
            return torch.empty_like(args[0], device="cpu")
        dtype = self.autocast and (self.autocast if function in LOWER else torch.float32 if function in FP32 else None)
        if dtype:
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        return function(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        cast = value.to(dtype)
        if value.is_leaf and value.requires_grad:
            self._casts.append(cast)
        return cast


class FusedAttention(torch.autograd.Function):
    """The memory of scaled-dot-product attention in one kernel (arXiv:2307.08691), not its values.

    Queries, keys, values and result are kept, and a logarithm for each row; the backward pass sums in fp32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        query.new_empty(query.shape, dtype=torch.float32)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def off_the_device(model: nn.Module) -> None:
    """Let a model's weights go, as moving it to the computer's memory would."""
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)


def run_backward(loss: Tensor) -> None:
    """The backward pass; `loss.backward()` would leave the modes that are entered out of what it runs."""
    one = torch.ones_like(loss)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
