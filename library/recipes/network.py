"""Training an adapter network, from checked options to the file: the recipe of train_network.py and its kin."""

import importlib
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.contrib.logging import logging_redirect_tqdm

from library.dataset.dataset import TrainingDataset
from library.dataset.own_dataset import OwnDataset
from library.errors import UserError
from library.families import family_class, writes_text
from library.families.base import ModelFamily
from library.generating.after_training import add_cover, finish_run, report_on
from library.layers.unet_blocks import keep_little
from library.options.derived import (
    DEFAULT_NETWORK,
    caches_latents,
    learning_rates,
    network_arguments,
    network_module,
)
from library.options.groups import TrainNetworkOptions
from library.preflight import Preflight
from library.recipes.network_building import build_network, check_arguments, load_algorithm, merge_base_weights
from library.recipes.run_record import recorded
from library.training.block_swap import swap_blocks
from library.training.caching import cache_latents, cache_text
from library.training.compiling import check_compiler, compile_unet
from library.training.deterministic import same_bits
from library.training.eight_bit import FlatEightBit, can_be_flat_in_8_bits, queue_steps
from library.training.flat_optimizer import FlatOptimizer, can_be_flat
from library.training.fused import fuse
from library.training.gradients import flat_of
from library.training.loop import run
from library.training.memory_errors import memory_for
from library.training.metadata import TrainingMetadata
from library.training.network_recipe import NetworkRecipe
from library.training.on_cpu import prepare_for_cpu, warn_of_slow_bf16
from library.training.optimizer_trial import try_optimizer
from library.training.optimizers import OptimizerSpec, build_optimizer, check_optimizer_arguments
from library.training.plan import StepPlan, num_processes
from library.training.precision import (
    build_accelerator,
    check_fewer_bits,
    checkpoint_function,
    choose_attention,
    full_dtype,
    store_in_fewer_bits,
    weight_dtype,
)
from library.training.reports import TrainedPart, parts_table
from library.training.rescue import kept_when_it_fails
from library.training.restoring import load_state
from library.training.resuming import resumed_state, state_at_step
from library.training.saving import LoopState
from library.training.schedulers import build_scheduler, check_schedule
from library.training.stopping import StopRequest, remove_old_request
from library.training.text_caching import cache_text_on_disk
from library.training.trackers import start_trackers
from library.training.validation import Validation

logger = logging.getLogger(__name__)

UNET = "U-Net"  # among the parts that are trained; the others are text encoders


def train_network(options: TrainNetworkOptions, checked: Preflight) -> Path:
    """Train and return the path of the network's file."""
    with memory_for("training", options), same_bits(options):
        return _train_network(options, checked)


@dataclass(frozen=True)
class Trainable:
    """The model with the network on it, and what trains the network."""

    family: ModelFamily
    network: nn.Module
    groups: list[dict]
    parts: list[TrainedPart]
    optimizer: Optimizer
    spec: OptimizerSpec
    optimizer_name: str  # for metadata
    scheduler: LRScheduler


def build_trainable(
    options: TrainNetworkOptions, checked: Preflight, state: LoopState, accelerator: Accelerator
) -> Trainable:
    """Load the model and build the rest; UserError for what only the classes themselves can tell."""
    algorithm = load_algorithm(network_module(options))
    arguments = network_arguments(options)
    check_arguments(algorithm, options, arguments, checked.resume)
    with memory_for("loading the model", options):
        family = load_family(options, checked.family, accelerator.device)
    torch.manual_seed(state.seed)  # the network begins the same, whatever loading has drawn
    network = build_network(algorithm, family, options, arguments).to(accelerator.device, full_dtype(options))
    network = accelerator.prepare_model(network, evaluation_mode=True)  # not wrapped: the loop averages gradients
    groups = trained_groups(network, options)
    parts = trained_parts(network, groups)
    family.trains_text_encoder = any(part.learning_rates for part in parts if part.name != UNET)
    flatten(network, groups, family.dtype, options)
    optimizer, spec, optimizer_name = build_optimizer(options, groups)
    queue_steps(optimizer)
    if (flat := flat_of(network)) and can_be_flat(optimizer, accelerator.device):
        optimizer = FlatOptimizer(optimizer, flat)
    elif flat and can_be_flat_in_8_bits(optimizer):
        optimizer = FlatEightBit(optimizer, flat)
    scheduler = build_scheduler(options, optimizer, spec, checked.plan.max_train_steps)
    return Trainable(family, network, groups, parts, optimizer, spec, optimizer_name, scheduler)


def _train_network(options: TrainNetworkOptions, checked: Preflight) -> Path:
    plan = checked.plan
    check_optimizer_arguments(options)
    check_schedule(options, plan.max_train_steps)
    state = first_state(options, plan, checked.resume)
    remove_old_request(Path(options.output_dir))
    accelerator = start_accelerator(options, state)
    # The first process has put back what a killed run set aside; the others may have looked before.
    state, resume = broadcast_object_list([state, checked.resume])
    made = build_trainable(options, checked, state, accelerator)
    family = made.family

    dataset, held_out = build_datasets(options, checked, state.seed)
    datasets = [dataset] if held_out is None else [dataset, held_out]
    with memory_for("caching latents", options):
        cache_latents_of(datasets, family, options, accelerator)

    network = made.network
    optimizer, scheduler = accelerator.prepare(made.optimizer, made.scheduler)
    restore(accelerator, state, resume)
    if not family.trains_text_encoder:
        network.eval()  # adapters of the text encoder, where they were loaded, without dropout
        with memory_for("encoding captions", options):
            cache_text_of(datasets, family, options, accelerator)
    with memory_for("loading the model", options):
        prepare_unet(family, network, options)  # last, when what was needed before has left the memory

    network.training_begins(plan.max_train_steps, state.step)
    metadata = TrainingMetadata(options, family.metadata(), dataset, made.optimizer_name, made.spec, plan)
    recipe = NetworkRecipe(
        family, network, optimizer, made.spec, made.groups, accelerator, options, metadata, checked.prompts, plan
    )
    if resume:
        recipe.more_state.restore(resume)
    if accelerator.is_main_process:
        metadata.hashes.start()
        pairs = zip(made.groups, optimizer.param_groups, strict=True)  # a state's rates go before the options'
        groups = [made_group | {"lr": group.get("initial_lr", group["lr"])} for made_group, group in pairs]
        print(parts_table(trained_parts(network, groups) if resume else made.parts), flush=True)
    start_trackers(accelerator, options)
    if resume:
        recipe.files.remove_outdated(state)
    recipe.sample_at_first(state)
    sampler = dataset.sampler(plan.accumulation, plan.num_processes)
    validation = None if held_out is None else Validation(held_out, options, accelerator)
    with (  # the first from the outside lets no Ctrl-C end what the others write
        StopRequest(recipe.names.folder, accelerator) as stop,
        recorded(options, checked, recipe, accelerator, state),
        logging_redirect_tqdm(),
    ):
        with kept_when_it_fails(recipe, state):
            parts = recipe, dataset, sampler, optimizer, scheduler, accelerator
            state = run(*parts, options, plan, state, validation, stop)
        cover = add_cover(options, recipe)
        path = recipe.finish(state)
        finish_run(options, recipe, path, cover)
    report_on(options, checked, recipe)
    accelerator.end_training()
    return path


def start_accelerator(options: TrainNetworkOptions, state: LoopState) -> Accelerator:
    """Device and processes, all of them seeded with the seed of the first."""
    accelerator = build_accelerator(options)
    if accelerator.num_processes != num_processes():
        raise UserError(
            f"this run was launched in {num_processes()} processes, and accelerate finds no GPUs to share between "
            "them: check nvidia-smi and that torch is no CPU build, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )
    check_compiler(options, accelerator.device)
    check_fewer_bits(options, accelerator.device)
    try_optimizer(options, accelerator.device)
    warn_of_slow_bf16(options, accelerator.device)
    (state.seed,) = broadcast_object_list([state.seed])  # where none was given, every process drew its own
    set_seed(state.seed)
    return accelerator


def load_family(options: TrainNetworkOptions, name: str, device: torch.device) -> ModelFamily:
    """The base model as adapters find it. Its weights are read later, when and only if they are needed.

    Then, layer by layer, --base_weights are merged into them before they are stored in fewer bits.
    """
    family = family_class(name)(options, device, weight_dtype(options))
    if options.blocks_to_swap:
        family.swap_blocks(options.blocks_to_swap)
    merge_base_weights(importlib.import_module(DEFAULT_NETWORK), family, options)
    store_in_fewer_bits(family, options)
    return family


def trained_groups(network: nn.Module, options: TrainNetworkOptions) -> list[dict]:
    """The parameters to train, in groups of one learning rate; UserError where there are none. Others are frozen."""
    groups = network.param_groups(*learning_rates(options))
    if not groups:
        raise UserError("nothing is trained: all learning rates, times their weights in --network_args, are 0")
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return groups


def flatten(network: nn.Module, groups: list[dict], dtype: torch.dtype, options: TrainNetworkOptions) -> None:
    """Put what is trained into one buffer, where that can be; networks of other projects have none."""
    if hasattr(network, "flatten") and not options.torch_compile:  # whose graphs have gradients of their own
        network.flatten(groups, dtype)


def build_datasets(
    options: TrainNetworkOptions, checked: Preflight, seed: int
) -> tuple[TrainingDataset | OwnDataset, TrainingDataset | None]:
    """The pictures to train, and those that are held out, where there are any."""
    if checked.scanned.own is not None:
        return OwnDataset(checked.scanned, options, seed, checked.plan.max_train_steps), None
    dataset, held_out = (
        scanned and TrainingDataset(scanned, options, seed, checked.plan.max_train_steps)
        for scanned in (checked.scanned, checked.validation)
    )
    return dataset, held_out


def cache_latents_of(
    datasets: list[TrainingDataset], family: ModelFamily, options: TrainNetworkOptions, accelerator: Accelerator
) -> None:
    """Compute all latents now, where they are cached, so that the VAE can leave the device."""
    if caches_latents(options):
        for dataset in datasets:
            cache_latents(dataset, family, options, accelerator)
        family.vae.release()


def cache_text_of(
    datasets: list[TrainingDataset], family: ModelFamily, options: TrainNetworkOptions, accelerator: Accelerator
) -> None:
    """Encode all captions now, where that is possible, so that frozen text encoders can leave the device."""
    if writes_text(options, family.name):
        cache_text_on_disk(datasets, family, options, accelerator)
    else:
        cache_text(datasets, family, accelerator)


def prepare_unet(family: ModelFamily, network: nn.Module, options: TrainNetworkOptions) -> None:
    """The U-Net and how it runs, with the network attached: layers as the device likes them, swapped, compiled.

    Text encoders that are trained are read by then too.
    """
    choose_attention(family.unet, options, family.device)
    if family.trains_text_encoder:
        _ = family.text_encoders
    prepare_for_cpu(family, network, options)
    if not options.torch_compile:  # a compiler decides itself what is made again
        keep_little(family.unet)
        fuse(family.unet, options, family.device)
    swap_blocks(family, options)
    if options.gradient_checkpointing:
        family.enable_gradient_checkpointing(checkpoint_function(options))
    compile_unet(family.unet, options)


def restore(accelerator: Accelerator, state: LoopState, folder: Path | None) -> None:
    """Go on from a state; its random generators need not be there, as training seeds its own for every batch."""
    if folder:
        load_state(accelerator, folder)
        logger.info("going on from step %d of epoch %d", state.step, state.epoch)


def first_state(options: TrainNetworkOptions, plan: StepPlan, resume: Path | None) -> LoopState:
    """Where training starts: at the beginning, at --initial_step or --initial_epoch, or where --resume left off."""
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    if resume:
        return resumed_state(resume, plan, seed)
    step = options.initial_step or 0
    if options.initial_step is None and options.initial_epoch is not None:
        step = (options.initial_epoch - 1) * plan.steps_per_epoch
    if step >= plan.max_train_steps:
        name = "initial_epoch" if options.initial_step is None else "initial_step"
        raise UserError(
            f"--{name} {getattr(options, name)} begins after the last step, {plan.max_train_steps}; "
            "give a larger --max_train_epochs or --max_train_steps"
        )
    return state_at_step(step, plan, seed)


def trained_parts(network: nn.Module, groups: list[dict]) -> list[TrainedPart]:
    """Rows of the table: every part with what the optimizer does with it."""
    rows = []
    usual = [group for group in groups if not group["name"].endswith(" plus")]
    rates = {id(parameter): group["lr"] for group in usual for parameter in group["params"]}
    names = {"te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2", "unet": UNET}
    text = {adapter.part for adapter in network.adapters()} - {"unet"} or {"te"}
    for part in (*sorted(text), "unet"):
        adapters = [adapter for adapter in network.adapters() if adapter.part == part]
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
        rates_here = [rates[id(p)] for p in parameters if id(p) in rates]
        rows.append(
            TrainedPart(names[part], len(adapters), sum(p.numel() for p in parameters), sorted(set(rates_here)))
        )
    return rows
