"""Train every network of this suite on the embedded base, as far as can be alike, and compare what comes of it.

python tools/compare_networks.py build/networks

Writes compare.md, a table, and compare.png, what each draws. A network that was trained there already is not again.
"""

import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.verdicts import verify
from library.errors import UserError, run_script
from library.files import write_text_whole
from library.options.checks import at_least
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.safetensors_header import read_header
from library.texts import read_json

HERE = Path(__file__).resolve().parents[1]
SIZE_AND_STEPS = "--w 128 --h 128 --s 20 --l 5"
PROMPTS = {  # in the picture, and as it is drawn
    "yellow": f"a yabin on a yellow background {SIZE_AND_STEPS} --d 3",
    "pink": f"a yabin on a pink background {SIZE_AND_STEPS} --d 4",
    "heart": f"a red heart on a white background {SIZE_AND_STEPS} --d 5",
}
HEAD = "| | loss on held-out pictures | s/step | numbers in the file | KB | applied exactly by |"
CONVOLUTIONS = ["conv_dim=8", "conv_alpha=8"]
NETWORKS: dict[str, dict[str, Any]] = {  # as many numbers to train as LoRA of rank 8 has, where that can be
    "LoRA": dict(module="lora", dim=8, args=CONVOLUTIONS),
    "LoRA, rsLoRA": dict(module="lora", dim=8, args=[*CONVOLUTIONS, "rslora=True"]),
    "LoRA, orthogonal": dict(module="lora", dim=8, args=[*CONVOLUTIONS, "init=orthogonal"]),
    "LoRA, PiSSA": dict(module="lora", dim=8, args=[*CONVOLUTIONS, "init=pissa"]),
    "LoRA-FA": dict(module="lora_fa", dim=16, args=["conv_dim=16", "conv_alpha=16"]),
    "DyLoRA": dict(module="dylora", dim=8, args=["unit=2", "conv_dim=8"]),
    "DoRA": dict(module="dora", dim=8, args=CONVOLUTIONS),
    "LoHa": dict(module="loha", dim=4, args=["conv_dim=4", "conv_alpha=4"]),
    "LoKr": dict(module="lokr", dim=8, args=["factor=2", "conv_dim=8", "conv_alpha=8"]),
    "OFT": dict(module="oft", dim=4, alpha=0, args=["enable_all_linear=True", "enable_conv=True"]),
    "AdaLoRA": dict(module="adalora", dim=8, args=CONVOLUTIONS),
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions(OptionGroup):
    """Train every network on the embedded base and compare what comes of it."""

    folder: str = option(REQUIRED, "folder for the runs and the table", flag_type="path", is_positional=True)
    max_train_steps: int = option(100, "steps of each run")
    learning_rate: float = option(5e-3, "learning rate of all")

    def check(self) -> list[str]:
        return at_least(self, 1, "max_train_steps")


OPTIONS = CompareOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    folder = Path(options.folder)
    for name, network in NETWORKS.items():
        if not (folder / file_name(name) / "network-run.json").is_file():
            print(f"training {name}", flush=True)
            train(folder / file_name(name), network, options)
    lines = [HEAD, "|---|---|---|---|---|---|", *(row(folder, name) for name in NETWORKS)]
    write_text_whole(folder / "compare.md", "\n".join(lines) + "\n")
    draw(folder)
    print(folder / "compare.md", folder / "compare.png", sep="\n")


def file_name(name: str) -> str:
    return name.lower().replace(", ", "_").replace("-", "_")


def train(folder: Path, network: dict[str, Any], options: CompareOptions) -> None:
    """One run; UserError where it fails, with the place of what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, log = folder / "prompts.txt", folder / "log.txt"
    write_text_whole(prompts, "\n".join(PROMPTS.values()) + "\n")
    flags = dict(
        pretrained_model_name_or_path=HERE / "assets/demo_base", train_data_dir=HERE / "assets/demo_pictures/train",
        resolution="128", caption_extension=".txt", output_dir=folder, output_name="network", save_precision="fp16",
        network_module=f"networks.{network['module']}", network_dim=network["dim"],
        network_alpha=network.get("alpha", network["dim"]), learning_rate=options.learning_rate,
        optimizer_type="AdamW", lr_scheduler="cosine", lr_warmup_steps=10, train_batch_size=4, seed=1,
        max_train_steps=options.max_train_steps, validation_split=0.25, validation_seed=1,
        validate_every_n_steps=options.max_train_steps, sample_prompts=prompts,
        sample_every_n_steps=options.max_train_steps,
    )  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if network["module"] == "oft":
        words.append("--network_train_unet_only")
    command = [sys.executable, str(HERE / "train_network.py"), *words, "--cache_latents", "--no_report"]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([*command, "--network_args", *network["args"]], stdout=file, stderr=file, check=False)
    if done.returncode:
        raise UserError(f"{folder.name} ended with exit code {done.returncode}: see {log}")


def row(folder: Path, name: str) -> str:
    """What the record and the file of a run tell, as a row of the table."""
    run = folder / file_name(name)
    record = read_json((run / "network-run.json").read_text(encoding="utf-8"))
    path = run / "network.safetensors"
    shapes = read_header(path, "network").shapes.values()
    num_numbers = sum(map(prod, shapes))
    exact = [found.name for found in verify(path, "network").consumers if found.verdict == "exact"]
    loss, seconds = record["curves"]["validation loss"]["points"][-1][1], record["seconds_a_step"]["p50"]
    facts = f"{loss:.4f}", f"{seconds:.2f}", f"{num_numbers:,}", f"{path.stat().st_size / 1000:,.0f}"
    return f"| {name} | {' | '.join(facts)} | {', '.join(exact) or 'none'} |"


def draw(folder: Path) -> None:
    """The last previews of all runs in one picture, a column each."""
    from PIL import Image

    from library.pictures import labelled_sheet, write_picture

    columns = []
    for name in NETWORKS:
        previews = sorted((folder / file_name(name) / "sample").glob("*.png"))[-len(PROMPTS) :]
        columns.append([Image.open(preview).convert("RGB") for preview in previews])
    rows = list(map(list, zip(*columns, strict=True)))
    write_picture(folder / "compare.png", labelled_sheet(rows, list(PROMPTS), list(NETWORKS)))


if __name__ == "__main__":
    run_script(main)
