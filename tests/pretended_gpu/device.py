"""Runs a script as if there were a GPU: its CUDA tensors lie in the computer's memory, and the CPU computes with them.

tests/pretended_gpu/run.sh train_network.py --config_file x.toml      # needs gcc, and a PyTorch built for CUDA
tests/pretended_gpu/run.sh -m pytest tests/test_sdxl.py

So what only happens on a GPU is run without one: tensors of two devices that meet are an error, formats are those of
CUDA's kernels, and at the end stands how often, and where, the host waited. Not here: time, memory, kernels of our own,
CUDA graphs, numbers from the GPU's random generators (they come from the CPU's). Tests that expect the words of a CPU,
or pinned memory, fail.
"""

import atexit
import ctypes
import runpy
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
OURS = f"{ROOT / 'library'}/", f"{ROOT / 'networks'}/"
WITHOUT_KERNEL = ("record_stream", "is_pinned", "_pin_memory", "set_", "detach", "detach_", "resize_", "alias")
WITHOUT_KERNEL += ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")
READ_BY_HOST = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select")
MANY_DEVICES = ("copy_", "_to_copy")
waits: Counter[str] = Counter()


def waited(why: str) -> None:
    """Note that the host waits for the device, and which of our lines has it do so."""
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
    place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "elsewhere"
    waits[f"{place}: {why}"] += 1


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in the same memory."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_gpu(value: Any) -> Any:
    """A copy on the device of what the CPU computed."""
    if not isinstance(value, Tensor) or value.is_cuda:
        return value
    copy = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda")
    if value.numel():
        on_cpu(copy).copy_(value)
    return copy


class PretendedGpu(TorchDispatchMode):
    """Computes on the CPU what has to do with CUDA tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), function._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        has_cuda = any(tensor.is_cuda for tensor in tensors)
        if not has_cuda and (device is None or device.type != "cuda"):
            return function(*args, **kwargs)
        if name in WITHOUT_KERNEL or function.is_view:
            return function(*args, **kwargs)
        self._check(function, name, tensors, args, kwargs)
        if kernel := KERNELS.get(name):
            return kernel(function, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        result = function(*tree_map(self._for_cpu, args), **tree_map(self._for_cpu, kwargs))
        returns = function._schema.returns
        if not returns or name == "_local_scalar_dense" or (device and device.type != "cuda"):
            return result
        if len(returns) == 1:
            return self._returned(function, returns[0], result, args, kwargs)
        return tuple(
            self._returned(function, one, value, args, kwargs) for one, value in zip(returns, result, strict=True)
        )

    def _check(self, function: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
        """RuntimeError for tensors of two devices; what the host waits for is noted."""
        is_index = name.startswith(("index", "_index_put"))
        are_two = len({tensor.device.type for tensor in tensors if tensor.ndim}) > 1
        if are_two and name not in MANY_DEVICES and not is_index:
            found = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
            raise RuntimeError(f"tensors of two devices in {function}: {found}")
        if name in READ_BY_HOST or (is_index and (are_two or any(t.dtype == torch.bool for t in tensors))):
            waited(name)
        if name == "_to_copy" and tensors[0].is_cuda and str(kwargs.get("device")) == "cpu":
            waited("to the CPU")
        is_queued = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        if name == "copy_" and args[1].is_cuda and not args[0].is_cuda and not is_queued:
            waited("copied to the CPU")

    def _for_cpu(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return on_cpu(value) if value.is_cuda else value
        if isinstance(value, torch.Generator):
            return value if value.device.type == "cpu" else None
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def _returned(self, function: Any, one: Any, value: Any, args: tuple, kwargs: dict) -> Any:
        """What was computed, or the argument that was written to."""
        if one.alias_info is None or not one.alias_info.is_write:
            return tree_map(on_gpu, value)
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info and argument.alias_info.before_set & one.alias_info.before_set:
                return kwargs[argument.name] if argument.name in kwargs else args[place]
        raise AssertionError(function)


def attention(function: Any, args: tuple, kwargs: dict) -> tuple:
    """The fused kernels of scaled-dot-product attention; PyTorch has chosen one of them."""
    is_flash = "flash" in str(function)
    query, key, value = map(on_cpu, args[:3])
    bias = None if is_flash or args[3] is None else on_cpu(args[3])
    dropout, causal = (*args[3 if is_flash else 5 :], 0.0, False)[:2]
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, causal, attn_mask=bias, scale=kwargs.get("scale")
    )
    out, sums, nothing = on_gpu(out), on_gpu(sums), on_gpu(torch.zeros((), dtype=torch.int64))
    if "efficient" in str(function):
        return out, sums, nothing, nothing
    return out, sums, None, None, query.shape[2], key.shape[2], nothing, nothing, nothing


def attention_gradient(function: Any, args: tuple, kwargs: dict) -> tuple:
    is_efficient = "efficient" in str(function)
    gradient, query, key, value, *others = args
    bias = others.pop(0) if is_efficient else None
    causal = kwargs.get("is_causal", len(args) > 11 and bool(args[11]))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(on_cpu, (gradient, query, key, value, *others[:2])), 0.0, causal,
        attn_mask=None if bias is None else on_cpu(bias), scale=kwargs.get("scale"),
    )  # fmt: skip
    return (*map(on_gpu, gradients), *([None] if is_efficient else []))


def normalised(function: Any, args: tuple, kwargs: dict) -> tuple:
    """LayerNorm and GroupNorm, forward and backward: one format for all but statistics, which are summed in fp32."""
    values = [value for value in args if isinstance(value, Tensor)]
    dtype, is_backward = values[0].dtype, "backward" in str(function)
    weights = [value for value in values if value.ndim == 1]
    if any(weight.dtype != dtype for weight in weights):
        raise RuntimeError(f"{function}: weights of {weights[0].dtype} beside an input of {dtype}")
    if "group" in str(function) and not values[0].is_contiguous():
        raise RuntimeError(f"{function} of a tensor that is not contiguous")
    result = function(*(on_cpu(value).float() if isinstance(value, Tensor) else value for value in args))
    keeps_fp32 = "layer" in str(function) and not is_backward
    return tuple(
        None if value is None else on_gpu(value if keeps_fp32 and place else value.to(dtype))
        for place, value in enumerate(result)
    )


def unscale(function: Any, args: tuple, kwargs: dict) -> None:
    """Gradients in fp16's scale, back in their own."""
    gradients, found_infinite, factor = args
    for gradient in map(on_cpu, gradients):
        gradient.mul_(on_cpu(factor).to(gradient.dtype))
        if not gradient.isfinite().all():
            on_cpu(found_infinite).fill_(1.0)


def update_scale(function: Any, args: tuple, kwargs: dict) -> Tensor:
    scale, tracker, found_infinite = map(on_cpu, args[:3])
    growth, backoff, interval = args[3:]
    tracker.add_(1)
    if found_infinite.item() or tracker.item() == interval:
        scale.mul_(backoff if found_infinite.item() else growth)
        tracker.zero_()
    return args[0]


KERNELS: dict[str, Callable[[Any, tuple, dict], Any]] = {
    **{f"_scaled_dot_product_{kind}_attention": attention for kind in ("flash", "efficient", "cudnn")},
    **{
        f"_scaled_dot_product_{kind}_attention_backward": attention_gradient for kind in ("flash", "efficient", "cudnn")
    },
    **{f"native_{kind}_norm": normalised for kind in ("layer", "group")},
    **{f"native_{kind}_norm_backward": normalised for kind in ("layer", "group")},
    "_amp_foreach_non_finite_check_and_unscale_": unscale,
    "_amp_update_scale_": update_scale,
}


def pretend(work: Callable[[], Any]) -> Any:
    """Run something where CUDA tensors are computed with; the backward pass stays in its thread."""
    with MODE, torch.autograd.set_multithreading_enabled(False):
        return work()


def noted(function: Callable, why: str) -> Callable:
    def wrapped(*arguments: Any) -> Any:
        waited(why)
        return function(*arguments)

    return wrapped


def report() -> None:
    print("\nwhere the host waited for the device:" if waits else "\nthe host never waited")
    for place, count in waits.most_common():
        print(f"{count:6d}  {place}")


MODE = PretendedGpu()

if __name__ == "__main__":
    run_thread = threading.Thread.run
    threading.Thread.run = lambda thread: pretend(lambda: run_thread(thread))
    torch.cuda.synchronize = noted(torch.cuda.synchronize, "torch.cuda.synchronize")
    torch.cuda.Event.synchronize = noted(torch.cuda.Event.synchronize, "an event of the device")
    atexit.register(report)
    _, script, *rest = sys.argv
    is_module = script == "-m"
    name = rest.pop(0) if is_module else script
    sys.argv = [name, *rest]
    sys.path[0] = str(ROOT)
    run = runpy.run_module if is_module else runpy.run_path
    pretend(lambda: run(name, run_name="__main__"))
