"""Who is compared: this suite in its modes, a plain loop over diffusers, and a checkout of sd-scripts. No torch."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.benchmarks.inputs import HERE, Inputs

ROOT = HERE.parents[1]
SCRIPTS = {"sd1": "train_network.py", "sdxl": "sdxl_train_network.py"}
REDUCED = ("--full_bf16", "--full_fp16", "--fp8_base", "--fp8_base_unet")
LEARNING_RATE, SEED = "1e-4", "1"

OUR_MODES = {
    "fp32": "--cache_latents",
    "bf16": "--cache_latents --mixed_precision bf16",
    "gradient_checkpointing": "--cache_latents --mixed_precision bf16 --gradient_checkpointing",
}
DIFFUSERS_MODES = {"fp32": "", "bf16": "--mixed_precision bf16"}
PEER_MODES = {
    "defaults": "",
    "best": "--sdpa --cache_latents",
    "best bf16": "--sdpa --cache_latents --mixed_precision bf16",
    "best full_bf16": "--sdpa --cache_latents --mixed_precision bf16 --full_bf16",
}
SDXL_TEXT = "--cache_text_encoder_outputs"


@dataclass(frozen=True)
class Job:
    """What a run is asked to do."""

    pictures: Path
    output: Path
    steps: int
    save_every: int = 0  # steps; 0 saves at the end alone
    cache_to_disk: bool = False


@dataclass(frozen=True)
class Contestant:
    """One program with the flags of one mode; an imitation is of a part of kohya's scripts, in code of ours."""

    kind: Literal["ours", "diffusers", "kohya", "imitation"]
    mode: str
    flags: tuple[str, ...]
    python: str
    script: Path

    @property
    def name(self) -> str:
        return f"{self.kind} {self.mode}".strip()

    @property
    def is_reduced(self) -> bool:
        """Whether it computes in less than fp32, so that its losses differ by rounding."""
        precision = self.flags[self.flags.index("--mixed_precision") + 1] if "--mixed_precision" in self.flags else "no"
        return precision != "no" or any(flag in REDUCED for flag in self.flags)

    @property
    def caches_latents(self) -> bool:
        return "--cache_latents" in self.flags or "--cache_latents_to_disk" in self.flags

    def arguments(self, inputs: Inputs, job: Job) -> list[str]:
        """The command line after the script."""
        words = diffusers_words(inputs, job) if self.kind == "diffusers" else kohya_words(inputs, job)
        if self.kind == "kohya":
            words += ["--tokenizer_cache_dir", str(inputs.model_dir / "tokenizers")]
        if job.cache_to_disk and self.kind != "diffusers":
            words += [f"{flag}_to_disk" for flag in ("--cache_latents", SDXL_TEXT) if flag in self.flags]
        return [*words, *self.flags]


def kohya_words(inputs: Inputs, job: Job) -> list[str]:
    """The flags of sd-scripts, which are ours too: U-Net alone, AdamW, one fixed size."""
    given = {
        "pretrained_model_name_or_path": inputs.file,
        "train_data_dir": job.pictures,
        "caption_extension": ".txt",
        "resolution": f"{inputs.resolution},{inputs.resolution}",
        "train_batch_size": inputs.batch,
        "network_module": "networks.lora",
        "network_dim": inputs.rank,
        "network_alpha": inputs.rank,
        "optimizer_type": "AdamW",
        "learning_rate": LEARNING_RATE,
        "max_train_steps": job.steps,
        "max_data_loader_n_workers": 0,
        "seed": SEED,
        "output_dir": job.output,
        "output_name": "lora",
        "save_model_as": "safetensors",
    }
    if job.save_every:
        given["save_every_n_steps"] = job.save_every
    return ["--network_train_unet_only", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def diffusers_words(inputs: Inputs, job: Job) -> list[str]:
    """The flags of diffusers_loop.py."""
    given = {
        "model": inputs.folder,
        "pictures": job.pictures,
        "output": job.output,
        "resolution": inputs.resolution,
        "rank": inputs.rank,
        "batch_size": inputs.batch,
        "learning_rate": LEARNING_RATE,
        "steps": job.steps,
        "save_every": job.save_every,
        "seed": SEED,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def modes_of(given: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """Mode -> flags, of NAME=FLAGS as given, or the defaults."""
    return dict(mode.split("=", 1) for mode in given) if given else defaults


def contestants_of(
    kind: str, modes: list[str], diffusers_modes: list[str], peer_modes: list[str], peer: Path | None, peer_python: str
) -> list[Contestant]:
    """All contestants in the order they run in; `kind` is that of the model."""
    text = SDXL_TEXT if kind == "sdxl" else ""
    found = []
    for mode, flags in modes_of(modes, {name: f"{flags} {text}" for name, flags in OUR_MODES.items()}).items():
        found.append(Contestant("ours", mode, tuple(shlex.split(flags)), sys.executable, ROOT / SCRIPTS[kind]))
    for mode, flags in modes_of(diffusers_modes, DIFFUSERS_MODES).items():
        script = HERE / "diffusers_loop.py"
        found.append(Contestant("diffusers", mode, tuple(shlex.split(flags)), sys.executable, script))
    if peer:
        defaults = {name: f"{flags} {text}" if "best" in name else flags for name, flags in PEER_MODES.items()}
        for mode, flags in modes_of(peer_modes, defaults).items():
            found.append(Contestant("kohya", mode, tuple(shlex.split(flags)), peer_python, peer / SCRIPTS[kind]))
    return found
