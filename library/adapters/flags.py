"""Flags that scripts on adapter files share, and what can be told of them before anything is read. Needs no torch."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.adapters.block_weights import BlockWeights, read_block_weights
from library.errors import counted
from library.options.checks import above_zero
from library.options.fields import REQUIRED, OptionGroup, flags_of, option

logger = logging.getLogger(__name__)

PRECISIONS = ("float", "fp16", "bf16")
WITHOUT_EFFECT = "has no effect: "  # what the help of such flags begins with
NETWORK_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class SaveFlags(OptionGroup):
    """The file that is written."""

    save_to: str = option(REQUIRED, "the file to write", flag_type="path")
    save_precision: str | None = option(None, "number format of the file", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class MergeFlags(SaveFlags):
    """What is merged."""

    models: list[str] | None = option(REQUIRED, "LoRA or other adapter files")
    ratios: list[float] | None = option(None, "how much of each file; 1 for all where none are given")
    lbws: list[str] | None = option(
        None, "for each file a list of 12, 17, 20 or 26 numbers in JSON: how much of it each block gets"
    )
    precision: str = option("float", "number format of the file where --save_precision names none", choices=PRECISIONS)
    no_metadata: bool = option(False, "write only what a program must know to load the file")

    def check(self) -> list[str]:
        problems = [f"--models: there is no file {path}" for path in self.models or [] if not os.path.isfile(path)]
        for name in ("ratios", "lbws"):
            given = getattr(self, name)
            if given and len(given) != len(self.models or []):
                files = counted(len(self.models or []), "file")
                problems.append(f"--{name} must be as many as --models, {files}, got {len(given)}")
        for text in self.lbws or []:
            try:
                read_block_weights(text)
            except ValueError as error:
                problems.append(f"--lbws must be {error}, got {text}")
        return problems


@dataclass(frozen=True, kw_only=True)
class RankFlags(OptionGroup):
    """The ranks of the LoRA that is written."""

    new_rank: int = option(4, "rank of Linear layers and 1x1 convolutions, with --dynamic_method the largest")
    new_conv_rank: int | None = option(None, "the same of other convolutions; --new_rank unless given")
    device: str | None = option(None, 'where to compute, such as "cuda"; the processor unless given')

    def check(self) -> list[str]:
        return above_zero(self, "new_rank", "new_conv_rank")

    def rank_of(self, inside: Sequence[int]) -> int:
        """The largest rank of a weight with these sizes behind the first."""
        is_pointwise = all(side == 1 for side in inside[1:])
        return self.new_rank if is_pointwise else self.new_conv_rank or self.new_rank


def ratios_of(flags: MergeFlags) -> list[tuple[Path, float, BlockWeights | None]]:
    """Each file with its ratio and its factors by block."""
    count = len(flags.models)
    blocks = [read_block_weights(text) for text in flags.lbws] if flags.lbws else [None] * count
    return list(zip(map(Path, flags.models), flags.ratios or [1.0] * count, blocks, strict=True))


def output_problems(save_to: str, inputs: Iterable[str | None], suffixes: Sequence[str]) -> list[str]:
    """Sentences where a file cannot have this path: its ending, or that it is one of those that are read."""
    problems = []
    if suffixes and Path(save_to).suffix.lower() not in suffixes:
        problems.append(f"--save_to must end in {' or '.join(suffixes)}, got {save_to}")
    if any(path and os.path.abspath(path) == os.path.abspath(save_to) for path in inputs):
        problems.append(f"--save_to must be another file than those that are read, got {save_to}")
    if not suffixes and os.path.exists(save_to):
        problems.append(f"--save_to: {save_to} is there already; name a new folder")
    return problems


def tell_replaced(save_to: str) -> None:
    """A line where a file is there already."""
    if os.path.exists(save_to):
        logger.warning("--save_to: %s is replaced when the new file is whole", save_to)


def warn_of_flags_without_effect(options: OptionGroup) -> None:
    """A line for each flag that was given and is only taken because kohya's scripts have it."""
    for name, flag in flags_of(type(options)).items():
        if name in options.sources and flag.help.startswith(WITHOUT_EFFECT):
            logger.warning("--%s %s", name, flag.help)
    if "precision" in options.sources and getattr(options, "save_precision", None):
        logger.warning("--precision has no effect beside --save_precision: changes are computed in float32")
