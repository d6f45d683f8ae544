"""The second part of --dry_run: one real step of the largest batch, and what each memory saver would give."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import psutil
import torch
from accelerate import Accelerator

from library.dataset.dataset import TrainingDataset
from library.dataset.loader import SharedBatches
from library.dataset.own_dataset import OwnDataset
from library.dataset.sampler import Draw
from library.families.base import Batch
from library.options.derived import caches_latents, network_module
from library.options.groups import TrainNetworkOptions
from library.preflight import Preflight
from library.recipes.memory_table import GIB, memory_table
from library.recipes.network import (
    Trainable,
    build_datasets,
    build_trainable,
    first_state,
    prepare_unet,
    start_accelerator,
)
from library.training.denoising import Ddpm, denoising_loss
from library.training.deterministic import same_bits
from library.training.gradients import gradients_of
from library.training.loop import update
from library.training.memory_errors import described, memory_for, memory_for_step
from library.training.reports import aligned, parts_table
from library.training.run_facts import device_name

ENOUGH_SECONDS = 20.0  # of one step; shorter ones are measured twice more, without what only the first has to do


@dataclass(frozen=True)
class Measured:
    """What one run of the largest batch took."""

    load_seconds: float
    first_step_seconds: float
    step_seconds: float
    peak_bytes: int


def measure(options: TrainNetworkOptions, checked: Preflight) -> None:
    """Train the largest batch, print what it took, and what each memory saver would; nothing is written."""
    with memory_for("training", options), same_bits(options):
        began = time.perf_counter()
        state = first_state(options, checked.plan, None)
        accelerator = start_accelerator(options, state)
        made = build_trainable(options, checked, state, accelerator)
        seconds = time.perf_counter() - began
        dataset, _ = build_datasets(options, checked, state.seed)
        batch = largest_batch(dataset)
        captions_change = isinstance(dataset, OwnDataset) or dataset.distinct_captions() is None
        found = run_steps(options, made, batch, accelerator, captions_change, seconds)
    if not accelerator.is_main_process:
        return
    height, width = batch.target_sizes_hw[0].tolist()
    print(
        f"\n{parts_table(made.parts)}\n\n{measured_table(found, batch, checked, accelerator.device, options)}\n",
        flush=True,
    )
    del made
    if not network_module(options).startswith("networks."):
        print("what each memory saver would give is estimated for networks.* alone")
        return
    measured = replace(options, train_batch_size=len(batch.captions))  # the datasets' own files may say another
    table = memory_table(measured, checked.family, (width, height), captions_change)
    print(f"GiB of a GPU's memory, estimated without one (tensors alone; about 1 GiB comes on top):\n{table}")


def largest_batch(dataset: TrainingDataset | OwnDataset) -> Batch:
    """The batch of the first epoch with the most pixels, as training would get it without caches."""

    def pixels(draws: Sequence[Draw]) -> int:
        return sum(prod(dataset.choices[draw.index].bucket_wh) for draw in draws) if dataset.choices else 0

    draws = max(SharedBatches(dataset.sampler(), num_processes=1, rank=0), key=pixels)
    return dataset.collate([dataset[draw] for draw in draws])


def run_steps(
    options: TrainNetworkOptions,
    made: Trainable,
    batch: Batch,
    accelerator: Accelerator,
    captions_change: bool,
    load_seconds: float,
) -> Measured:
    """One step, and where it is short two more; the network is thrown away afterwards."""
    family = made.family
    network = made.network.train()
    optimizer, scheduler = accelerator.prepare(made.optimizer, made.scheduler)
    objective = Ddpm(options, v_prediction=family.v_prediction, device=accelerator.device)
    gradients = gradients_of(optimizer, network)
    if made.spec.schedule_free:
        optimizer.train()
    batch = batch.to(accelerator.device)
    if caches_latents(options) and batch.latents is None:
        batch = replace(batch, latents=family.vae.encode(batch.images), images=None)
        family.vae.release()
    if not family.trains_text_encoder and not captions_change:
        with accelerator.autocast():
            family.remember_text(list(dict.fromkeys(batch.captions)), lambda: None)
    began = time.perf_counter()
    prepare_unet(family, network, options)
    load_seconds += time.perf_counter() - began

    def step() -> float:
        began = time.perf_counter()
        gradients.begin()
        with memory_for_step(batch, 1, options), accelerator.autocast():
            loss = denoising_loss(family, objective, batch).mean()
        with memory_for_step(batch, 1, options):
            accelerator.backward(loss)
            gradients.collect()
            update(gradients, optimizer, scheduler, accelerator, options.max_grad_norm)
            gradients.clear()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = step()
    seconds = first if first > ENOUGH_SECONDS else (step() + step()) / 2
    network.eval()
    return Measured(load_seconds, first, seconds, peak_bytes(accelerator.device))


def peak_bytes(device: torch.device) -> int:
    """The most memory that PyTorch held on a GPU so far, or this process of the computer's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def measured_table(
    found: Measured, batch: Batch, checked: Preflight, device: torch.device, options: TrainNetworkOptions
) -> str:
    """What was measured, and what follows for the whole run."""
    is_first = found.step_seconds == found.first_step_seconds
    micro_steps = checked.plan.max_train_steps * checked.plan.accumulation
    rows = [
        ("measured", f"on {device_name(device)}"),
        ("batch", described(batch)),
        ("loading the model", f"{found.load_seconds:.1f} s"),
        ("the first step", f"{found.first_step_seconds:.2f} s"),
        *([] if is_first else [("a step after it", f"{found.step_seconds:.2f} s")]),
        (f"all {micro_steps} batches", f"about {duration(found.step_seconds * micro_steps)}, smaller ones take less"),
        *(
            [("not measured", "--cuda_graphs, which has an effect from the fourth step on")]
            if options.cuda_graphs
            else []
        ),
        ("peak memory", f"{found.peak_bytes / GIB:.2f} GiB of {total_bytes(device) / GIB:.1f} GiB"),
    ]
    return aligned(rows, numbers=())


def duration(seconds: float) -> str:
    """A time as people say it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
