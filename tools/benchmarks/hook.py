"""Runs anyone's training script and watches it from inside, so that all contestants are measured by the same means.

python hook.py SETTINGS.json SCRIPT [ARGUMENT ...]

It stands on the standard library alone, since it runs in the interpreter of whatever is measured, and needs no more
than every trainer on PyTorch does: `Optimizer.step` ends a step, `Tensor.backward` has the loss, a DataLoader gives the
batches, and a diffusers AutoencoderKL encodes pictures. Nothing of it waits for the device.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

VIEWS = re.compile(  # operations that only look at memory in another way, or ask for some
    "aten::(_reshape_alias|_unsafe_view|alias|as_strided|broadcast_tensors|chunk|detach_?|empty|empty_like"
    "|empty_strided|expand|expand_as|flatten|lift_fresh|narrow|new_empty|permute|record_stream|reshape|resize_"
    "|resolve_conj|resolve_neg|result_type|select|set_|slice|split|split_with_sizes|squeeze|t|transpose|unbind"
    "|unflatten|unfold|unsqueeze|view|view_as)"
)
WAITS_ON_CPU = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")  # what would wait for a GPU
WAITS_ON_CUDA = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Watch:
    """What one process did, in seconds since it was started, and seconds of CPU."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.origin = time.perf_counter() - (time.time() - settings["started"])
        self.pid = os.getpid()
        self.steps: list[tuple[float, float, float]] = []  # (wall, CPU, CPU of its thread alone) at the end of each
        self.losses: list = []
        self.waits: list[float] = []  # seconds that each batch was waited for
        self.encodes: list[dict] = []  # calls of the VAE
        self.events: list = []  # of CUDA, at the end of each step
        self.profiler = None
        self.profiled: dict[str, int] = {}
        self.dataset: list[float] = []  # seconds and seconds of CPU of its construction

    def now(self) -> tuple[float, float]:
        return time.perf_counter() - self.origin, time.process_time()

    def step_ended(self) -> None:
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            if torch.cuda.is_current_stream_capturing():
                return
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        self.steps.append((*self.now(), time.thread_time()))

    def loss_seen(self, loss) -> None:
        """Note a loss before its backward pass; from one to the next is a step, for the profiler."""
        self.losses.append(loss.detach())
        if len(self.losses) == self.settings.get("profile_step"):
            self.start_profiler()
        elif self.profiler and not self.profiled:
            self.profiler.stop()
            self.profiled = counts_of(self.profiler)

    def start_profiler(self) -> None:
        torch = sys.modules["torch"]
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()

    def facts(self) -> dict:
        """Everything, once the script has ended; the first wait for the device."""
        times = os.times()
        facts = {
            "wall_s": self.now()[0],
            "cpu_s": times.user + times.system + times.children_user + times.children_system,
            "peak_rss": peak_rss(),
            "steps": self.steps,
            "losses": [float(loss) for loss in self.losses],
            "waits": self.waits,
            "encodes": self.encodes,
            "profiled": self.profiled,
            "dataset": self.dataset,
            "gpu_steps": [],
            "peak_gpu": 0,
        }
        if self.events:
            cuda = sys.modules["torch"].cuda
            cuda.synchronize()
            facts["gpu_steps"] = [self.events[0].elapsed_time(event) / 1000 for event in self.events]
            facts["peak_gpu"] = cuda.max_memory_allocated()
        return facts


def watch_torch(watch: Watch, torch) -> None:
    """Have the watch see steps, losses and batches."""
    optimizer, depth = importlib.import_module("torch.optim.optimizer"), []  # an optimizer may hold another one

    def step_begins(*_) -> None:
        depth.append(None)

    def step_ends(*_) -> None:
        depth.pop()
        if not depth:
            watch.step_ended()

    optimizer.register_optimizer_step_pre_hook(step_begins)
    optimizer.register_optimizer_step_post_hook(step_ends)

    backward = torch.Tensor.backward

    @functools.wraps(backward)
    def noted_backward(loss, *arguments, **more):
        watch.loss_seen(loss)
        return backward(loss, *arguments, **more)

    torch.Tensor.backward = noted_backward

    from torch.utils.data import dataloader  # torch has imported it already

    following = dataloader._BaseDataLoaderIter.__next__

    @functools.wraps(following)
    def timed_next(iterator):
        start = time.perf_counter()
        batch = following(iterator)
        watch.waits.append(time.perf_counter() - start)
        return batch

    dataloader._BaseDataLoaderIter.__next__ = timed_next
    if watch.settings.get("fixed_numbers"):
        fixed = runpy.run_path(str(Path(__file__).with_name("fixed_numbers.py")))
        fixed["fix"](torch, lambda: len(watch.steps))


def watch_vae(watch: Watch, module) -> None:
    """Have the watch see the calls of the VAE, and replace or narrow what it gives where that is asked."""
    encode, settings = module.AutoencoderKL.encode, watch.settings

    def null_encode(vae, images, return_dict: bool = True):
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        batch, _, height, width = images.shape
        shape = batch, 2 * vae.config.latent_channels, height // shrink, width // shrink
        posterior = module.DiagonalGaussianDistribution(images.new_zeros(shape))
        return module.AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @functools.wraps(encode)
    def noted_encode(vae, images, *arguments, **more):
        start = watch.now()
        encoded = (null_encode if settings.get("null_vae") else encode)(vae, images, *arguments, **more)
        size = list(images.shape[-2:])
        watch.encodes.append({"pictures": len(images), "size_hw": size, "start": start, "end": watch.now()})
        if settings.get("fixed_numbers"):  # a posterior without width: whatever is drawn, its sample is its mean
            encoded[0].std.zero_()
        return encoded

    module.AutoencoderKL.encode = noted_encode


def watch_dataset(watch: Watch, module) -> None:
    """Have the watch see how long sd-scripts take to construct their dataset, and end the run there."""
    construct = module.generate_dataset_group_by_blueprint

    @functools.wraps(construct)
    def timed_construct(*arguments, **more):
        start = watch.now()
        construct(*arguments, **more)
        watch.dataset = [end - begin for begin, end in zip(start, watch.now(), strict=True)]
        raise SystemExit

    module.generate_dataset_group_by_blueprint = timed_construct


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as that is imported; what is not imported costs nothing."""

    def __init__(self, actions: dict[str, Callable]):
        self.actions = actions
        self.is_asking = False

    def find_spec(self, name: str, path=None, target=None):
        if name not in self.actions or self.is_asking:
            return None
        self.is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.is_asking = False
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            if action := self.actions.pop(name, None):  # programs may look for a module without importing it
                action(module)

        spec.loader.exec_module = exec_module
        return spec


def counts_of(profiler) -> dict[str, int]:
    """Kernels, and waits of the host, in what was profiled; on a CPU operations stand for kernels."""
    events = profiler.events()
    on_cuda = [event for event in events if event.device_type.name == "CUDA"]
    if on_cuda:
        kernels = [event for event in on_cuda if not getattr(event, "is_user_annotation", False)]
        return {
            "kernels": sum(not event.name.startswith("Mem") for event in kernels),
            "waits": sum(event.name in WAITS_ON_CUDA for event in events),
        }
    roots = [event for event in events if event.cpu_parent is None]
    return {"kernels": sum(map(operations_of, roots)), "waits": sum(map(waits_of, roots))}


def operations_of(event) -> int:
    """The innermost operations in an event that compute something."""
    inner = sum(map(operations_of, event.cpu_children))
    is_operation = "::" in event.name and not event.name.startswith("autograd::")
    return inner or int(is_operation and not VIEWS.fullmatch(event.name))


def waits_of(event) -> int:
    """What in an event would wait for a GPU. Optimizers read how many steps they took, which is on the CPU anyway."""
    if event.name.startswith("Optimizer.step"):
        return 0
    return int(event.name in WAITS_ON_CPU) + sum(map(waits_of, event.cpu_children))


def peak_rss() -> int:
    """Bytes of memory at most; getrusage tells those of the parent too, until the process has more."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:  # Windows
        try:
            import psutil
        except ImportError:
            return 0
        return psutil.Process().memory_info().peak_wset


def main() -> None:
    settings_path, script, *arguments = sys.argv[1:]
    with open(settings_path, encoding="utf-8") as file:
        settings = json.load(file)
    watch = Watch(settings)
    actions = {
        "torch": functools.partial(watch_torch, watch),
        "diffusers.models.autoencoders.autoencoder_kl": functools.partial(watch_vae, watch),
    }
    if settings.get("dataset_alone"):
        actions["library.config_util"] = functools.partial(watch_dataset, watch)
    sys.meta_path.insert(0, AfterImport(actions))
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if os.getpid() == watch.pid:  # not a worker that was forked
            with open(settings["facts"], "w", encoding="utf-8") as file:
                json.dump(watch.facts(), file)


if __name__ == "__main__":
    main()
