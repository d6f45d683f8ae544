"""How much room the files of a run take, and whether the disks have it. Needs no torch."""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from library.dataset.buckets import BucketChoice
from library.dataset.scan import ScannedDataset
from library.errors import UserError
from library.families import writes_text
from library.families.clip_vocabulary import CHUNK
from library.families.detect import CheckpointInfo, read_shapes
from library.files import existing_part
from library.network_rules import rules_without_torch
from library.options.derived import network_arguments, network_module
from library.options.groups import TrainNetworkOptions
from library.training.plan import StepPlan, save_every_n_epochs

# Layers that a LoRA adapts, by the names of their weights in model files of one piece and of several.
ADAPTED = re.compile(
    r"(?P<unet>.*(transformer_blocks|attentions|diffusion_model)\..*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj"
    r"|net\.2))\.weight|.*(self_attn\.\w+|mlp\.\w+|attn\.out_proj)\.weight|.*attn\.in_proj_weight"
)
# Parameters a LoRA of rank 1 has for the U-Net and for the text encoders, where a file does not tell its shapes.
PER_RANK = {"sd1": (423_936, 165_888), "sd2": (432_128, 423_936), "sdxl": (2_659_840, 903_168)}
SDXL_TEXT_FLOATS = 768 + 1280  # of a token, and 1280 more of the whole text
STATE_FLOATS = 3  # for each parameter: itself, and two averages of most optimizers
ADALORA, ADALORA_FLOATS = "networks.adalora", 2  # for each parameter: its importance, and how uncertain that is


@dataclass(frozen=True)
class DiskNeed:
    """Files of one kind that a run writes into a folder."""

    what: str
    folder: Path
    num_files: int
    num_bytes: int  # of all of them, estimated
    least_bytes: int  # what they certainly take, less what is there of them already


def disk_needs(
    options: TrainNetworkOptions,
    checkpoint: CheckpointInfo,
    family: str,
    scanned: ScannedDataset,
    choices: Sequence[BucketChoice],
    plan: StepPlan,
) -> list[DiskNeed]:
    """The room that networks, states and caches take; what cannot be told beforehand is left out."""
    needs = _output_needs(options, checkpoint, plan) + cache_needs(options, family, scanned, choices)
    return [need for need in needs if need.num_bytes]


def check_disk_space(needs: Iterable[DiskNeed]) -> list[str]:
    """UserError where the files certainly do not fit; a sentence for each disk that they may fill."""
    problems, warnings = [], []
    for mine in _by_disk(needs):
        folder = mine[0].folder
        free = free_bytes(folder)
        what = ", ".join(f"{need.what} {megabytes(need.num_bytes)}" for need in mine)
        has = f"the disk of {folder} has {megabytes(free)} left"
        if sum(need.least_bytes for need in mine) > free:
            problems.append(
                f"{has}, and the run writes more: {what}; make room, or keep fewer files (--save_last_n_epochs)"
            )
        elif sum(need.num_bytes for need in mine) > free:
            warnings.append(f"{has}, which may be too little: {what}")
    if problems:
        raise UserError(*problems)
    return warnings


def free_bytes(folder: Path) -> int:
    """The room on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(existing_part(folder)).free


def megabytes(num_bytes: int) -> str:
    """A size for people, in decimal units as disks have them."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def num_parameters(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> int:
    """Parameters of the LoRA that the options describe, 0 where that cannot be told: other networks, ranks of blocks.

    Convolutions come on top where they are asked for.
    """
    arguments = network_arguments(options)
    if network_module(options) != "networks.lora" or any(name.startswith("block_dims") for name in arguments):
        return 0
    return 0 if options.dim_from_weights else _of_rank_1(options, checkpoint) * (options.network_dim or 4)


def state_bytes(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> int:
    """What a state takes; AdaLoRA's has more ranks than its files. 0 where that cannot be told."""
    parameters, kept = num_parameters(options, checkpoint), int(options.ema)
    if network_module(options) == ADALORA:
        module = rules_without_torch(network_module(options))
        rank = options.network_dim or module.DEFAULT_RANK
        parameters = _of_rank_1(options, checkpoint) * module.first_rank(
            rank, rank, module.read(network_arguments(options))
        )
        kept += ADALORA_FLOATS
    size = 2 if options.full_fp16 or options.full_bf16 else 4
    return parameters * (STATE_FLOATS * size + kept * 4)


def num_checkpoints(options: TrainNetworkOptions, plan: StepPlan) -> int:
    """Network files that are there at the end, the last one included."""
    num_files = 1
    if every := save_every_n_epochs(options, plan.num_epochs):
        num_files += min((plan.num_epochs - 1) // every, options.save_last_n_epochs or plan.num_epochs)
    if every := options.save_every_n_steps:
        kept = (options.save_last_n_steps or plan.max_train_steps) // every + 1
        num_files += min((plan.max_train_steps - 1) // every, kept)
    return num_files


def _output_needs(options: TrainNetworkOptions, checkpoint: CheckpointInfo, plan: StepPlan) -> list[DiskNeed]:
    parameters, folder = num_parameters(options, checkpoint), Path(options.output_dir)
    in_half = options.save_precision in ("fp16", "bf16") or options.full_fp16 or options.full_bf16
    num_files = num_checkpoints(options, plan)
    networks = num_files * parameters * (2 if in_half else 4)
    num_states = num_files if options.save_state else int(options.save_state_on_train_end)
    states = num_states * state_bytes(options, checkpoint)
    present = _bytes_in(folder) if networks or states else 0
    return [
        DiskNeed("network files", folder, num_files, networks, max(0, networks - present)),
        DiskNeed("states", folder, num_states, states, max(0, states - present)),
    ]


def cache_needs(
    options: TrainNetworkOptions, family: str, scanned: ScannedDataset, choices: Sequence[BucketChoice]
) -> list[DiskNeed]:
    """The room that cached latents and text encoder outputs take beside the pictures."""
    if not (options.cache_latents_to_disk or writes_text(options, family)):
        return []
    latents: dict[str, dict[tuple, int]] = defaultdict(dict)
    for record, choice in zip(scanned.records, choices, strict=True):
        subset, area = scanned.subsets[record.subset], prod(choice.bucket_wh)
        floats = area // 64 * 4 * (2 if subset.flip_aug else 1) + area * (subset.alpha_mask or bool(record.mask_path))
        latents[os.path.dirname(record.file)][record.file, choice.bucket_wh] = 0 if record.is_gone else 4 * floats
    chunks = (options.max_token_length or CHUNK) // CHUNK
    text = 4 * ((chunks * CHUNK + 2) * SDXL_TEXT_FLOATS + 1280)
    needs = []
    for folder, sizes in latents.items():
        folder, num_pictures = Path(folder), len({file for file, _ in sizes})
        parts = {
            "latents": (len(sizes), sum(sizes.values()) if options.cache_latents_to_disk else 0),
            "text encoder outputs": (num_pictures, num_pictures * text if writes_text(options, family) else 0),
        }
        for what, (num_files, num_bytes) in parts.items():
            present = _bytes_in(folder) if num_bytes else 0
            needs.append(DiskNeed(what, folder, num_files, num_bytes, max(0, num_bytes - present)))
    return needs


def _of_rank_1(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> int:
    """Parameters that each rank of what is trained has."""
    unet, text = _parameters_per_rank(checkpoint)
    return unet * (not options.network_train_text_encoder_only) + text * (not options.network_train_unet_only)


def _parameters_per_rank(checkpoint: CheckpointInfo) -> tuple[int, int]:
    """Of the U-Net and of the text encoders: a layer's inputs and outputs, summed over the layers."""
    known = PER_RANK.get(checkpoint.kind, (0, 0))
    if checkpoint.is_folder or checkpoint.path.suffix != ".safetensors":
        return known
    unet = text = 0
    for name, shape in read_shapes(checkpoint.path, "--pretrained_model_name_or_path").items():
        if shape and len(shape) > 1 and (match := ADAPTED.fullmatch(name)):
            size = shape[0] + prod(shape[1:]) * (3 if name.endswith("in_proj_weight") else 1)  # queries, keys, values
            unet, text = (unet + size, text) if match["unet"] else (unet, text + size)
    return unet, text


def _by_disk(needs: Iterable[DiskNeed]) -> list[list[DiskNeed]]:
    disks: dict[int, list[DiskNeed]] = defaultdict(list)
    for need in needs:
        disks[os.stat(existing_part(need.folder)).st_dev].append(need)
    return list(disks.values())


def _bytes_in(folder: Path) -> int:
    """What lies in a folder already and may be replaced."""
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.name.endswith((".npz", ".pack", ".safetensors")))
