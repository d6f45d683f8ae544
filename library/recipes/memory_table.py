"""What a run needs of a GPU's memory, and what it would need with each thing that saves some: estimates, no GPU."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from library.families.base import Batch
from library.options.derived import caches_latents, network_arguments, network_module
from library.options.groups import TrainNetworkOptions
from library.recipes.network import flatten, load_family, prepare_unet, trained_groups, trained_parts
from library.recipes.network_building import build_network, load_algorithm
from library.training.gradients import flat_of
from library.training.memory_estimate import LikeCuda, LiveBytes, off_the_device, run_backward
from library.training.memory_savers import TRAINING
from library.training.optimizers import build_optimizer
from library.training.precision import full_dtype, needs_autocast, weight_dtype
from library.training.reports import aligned

META = torch.device("meta")
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors on the device; the phases before training and training itself each have a peak."""

    frozen: int  # weights of the models that stay while training
    trained: int  # the network's weights and gradients, and what the optimizer keeps
    step: int  # everything else that lives at the peak of a step
    before: int  # the peak before training: models loaded, pictures and captions encoded
    num_trained: int  # numbers, not bytes

    @property
    def training(self) -> int:
        return self.frozen + self.trained + self.step

    @property
    def total(self) -> int:
        return max(self.training, self.before)


def estimate(
    options: TrainNetworkOptions, family_name: str, size_wh: tuple[int, int], captions_change: bool
) -> MemoryEstimate:
    """The memory of training batches of this size; where captions change, frozen text encoders stay on the device."""
    autocast = weight_dtype(options) if needs_autocast(options) else None
    # xformers takes what PyTorch's own attention does; what compiled code keeps nobody knows beforehand
    options = replace(options, xformers=False, torch_compile=False)
    family = load_family(options, family_name, META)  # its parts have no memory until they are read
    with LiveBytes() as memory, LikeCuda(autocast):
        for part in family.parts.all():
            memory.ignore(part.layers)
        arguments = network_arguments(options)
        network = build_network(load_algorithm(network_module(options)), family, options, arguments)
        network.to(META, full_dtype(options)).train()
        groups = trained_groups(network, options)
        parameters = [parameter for group in groups for parameter in group["params"]]
        held = flattened(network, groups, family.dtype, options)
        family.trains_text_encoder = any(part.learning_rates for part in trained_parts(network, groups)[:-1])
        batch = empty_batch(options.train_batch_size, size_wh)
        latents = family.vae.encode(batch.images)
        if caches_latents(options):
            off_the_device(family.vae.model)
            batch = replace(batch, images=None)
        if not family.trains_text_encoder:
            conds = family.conds(batch)
            if not captions_change:
                for text_encoder in family.text_encoders:
                    off_the_device(text_encoder)
        prepare_unet(family, network, options)
        before, resident = memory.peak, memory.now
        memory.peak = 0
        if not caches_latents(options):
            latents = family.vae.encode(batch.images)
        if family.trains_text_encoder:
            conds = family.conds(batch)
        timesteps = torch.zeros(len(latents), device=META)
        loss = F.mse_loss(family.predict(latents, timesteps, conds).float(), latents)
        del conds, latents
        with LikeCuda(autocast):
            run_backward(loss)
    state = optimizer_bytes(options, parameters) + kept_bytes(network)
    state += sum(4 * parameter.numel() for parameter in parameters) if options.ema else 0
    frozen = resident - held.before
    num_trained = sum(parameter.numel() for parameter in parameters)
    return MemoryEstimate(frozen, held.training + state, memory.peak - frozen - held.training, before, num_trained)


class Held(NamedTuple):
    """Bytes of the network without its optimizer: as training begins, and with all its gradients."""

    before: int
    training: int


def flattened(network: nn.Module, groups: list[dict], dtype: torch.dtype, options: TrainNetworkOptions) -> Held:
    """Put the network into one buffer, as training does where that can be."""
    flatten(network, groups, dtype, options)
    if flat := flat_of(network):
        held = flat.num_bytes()
        return Held(held, held)
    weights = sum(parameter.nbytes for group in groups for parameter in group["params"])
    return Held(weights, 2 * weights)


def empty_batch(size: int, size_wh: tuple[int, int]) -> Batch:
    """Pictures without values, with a caption each."""
    width, height = size_wh
    sizes = torch.zeros(size, 2, dtype=torch.long)
    return Batch(
        captions=["a picture"] * size,
        loss_weights=torch.ones(size, device=META),
        images=torch.empty(size, 3, height, width, device=META),
        latents=None,
        conds=None,
        alpha_masks=None,
        original_sizes_hw=sizes,
        crop_top_lefts=sizes,
        target_sizes_hw=sizes,
    )


def optimizer_bytes(options: TrainNetworkOptions, parameters: list[nn.Parameter]) -> int:
    """What the optimizer keeps for parameters of these shapes: those of one step on one real parameter of each."""
    total = 0
    for shape, count in Counter(tuple(parameter.shape) for parameter in parameters).items():
        real = nn.Parameter(torch.zeros(shape, dtype=parameters[0].dtype))
        real.grad = torch.zeros_like(real)
        optimizer, spec, _ = build_optimizer(options, [{"params": [real], "lr": options.learning_rate, "name": "all"}])
        if spec.schedule_free:
            optimizer.train()
        optimizer.step()
        total += count * sum(value.nbytes for value in optimizer.state[real].values() if isinstance(value, Tensor))
    return total


def kept_bytes(network: nn.Module) -> int:
    """What the network keeps from step to step beside its weights, in a run that is long enough for its arguments."""
    network.training_begins(num_steps=10**9, step=0)
    values = tree_leaves([kept.state_dict() for kept in network.kept().values()])
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def savers_of(options: TrainNetworkOptions) -> dict[str, TrainNetworkOptions]:
    """The options with each saver that the run does not have already, and at the end with all of them."""
    savers = [saver for saver in TRAINING if saver.fields and not saver.is_taken(options)]
    changed = {saver.name: replace(options, **saver.fields) for saver in savers}
    if len(savers) > 1:
        all_fields = {name: value for saver in savers for name, value in saver.fields.items()}
        changed["all of these"] = replace(options, **all_fields)
    return changed


def memory_table(
    options: TrainNetworkOptions, family_name: str, size_wh: tuple[int, int], captions_change: bool
) -> str:
    """The estimate of the run as it is, with each saver alone and with all of them, in GiB."""
    head = ("run", "model", "network, optimizer", "a step", "before training", "peak", "saved")
    runs = {"as it is": options, **savers_of(options)}
    estimates = {
        name: estimate(changed, family_name, size_wh, captions_change)
        for name, changed in tqdm(runs.items(), desc="estimating memory", unit="runs", delay=1)
    }
    total = estimates["as it is"].total
    rows = [head]
    for name, found in estimates.items():
        values = (found.frozen, found.trained, found.step, found.before, found.total, total - found.total)
        rows.append((name, *(f"{value / GIB:.2f}" for value in values)))
    return aligned(rows, numbers=tuple(range(1, len(head))))
