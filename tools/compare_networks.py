"""Train every network of this suite on the embedded base, as far as can be alike, and compare what comes of it.

python tools/compare_networks.py build/networks

Writes compare.md, a table, and compare.png, what each draws. A network that was trained there already is not again.
"""

import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.verdicts import verify
from library.errors import UserError, run_script
from library.files import write_text_whole
from library.options.checks import at_least
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import TrainNetworkOptions
from library.safetensors_header import read_header
from library.texts import read_json

if TYPE_CHECKING:
    from library.recipes.memory_table import MemoryEstimate

HERE = Path(__file__).resolve().parents[1]
SIZE_AND_STEPS = "--w 128 --h 128 --s 20 --l 5"
PROMPTS = {  # in the picture, and as it is drawn
    "yellow": f"a yabin on a yellow background {SIZE_AND_STEPS} --d 3",
    "pink": f"a yabin on a pink background {SIZE_AND_STEPS} --d 4",
    "heart": f"a red heart on a white background {SIZE_AND_STEPS} --d 5",
}
COLUMNS = (
    "loss on held-out pictures", "learning rate", "CPU s/step", "trained", "numbers in the file", "KB",
    "MB beyond the model", "applied exactly by",
)  # fmt: skip
SIZE_WH, BATCH_SIZE = (128, 128), 4


def convolutions(rank: int) -> list[str]:
    return [f"conv_dim={rank}", f"conv_alpha={rank}"]


NETWORKS: dict[str, dict[str, Any]] = {  # as many numbers to train, at `rate` times the learning rate
    "LoRA": dict(module="lora", dim=18, args=[]),
    "LoCon": dict(module="lora", dim=8, args=convolutions(8)),
    "LoCon, rsLoRA": dict(module="lora", dim=8, args=[*convolutions(8), "rslora=True"]),
    "LoCon, orthogonal": dict(module="lora", dim=8, args=[*convolutions(8), "init=orthogonal"]),
    "LoCon, PiSSA": dict(module="lora", dim=8, args=[*convolutions(8), "init=pissa"]),
    "LoCon, GGPO": dict(module="lora", dim=8, args=[*convolutions(8), "ggpo_sigma=0.03", "ggpo_beta=0.01"]),
    "LoCon, nf4": dict(module="lora", dim=8, args=convolutions(8), flags={"base_quantization": "nf4"}),
    "LoRA-FA": dict(module="lora_fa", dim=26, args=convolutions(26)),
    "DyLoRA": dict(module="dylora", dim=8, args=["unit=2", "conv_dim=8"]),
    "DoRA": dict(module="dora", dim=8, args=convolutions(8)),
    "LoHa": dict(module="loha", dim=4, args=convolutions(4)),
    "LoKr": dict(module="lokr", dim=20, args=["factor=2", *convolutions(15)]),
    "OFT": dict(module="oft", dim=8, alpha=0, args=["enable_all_linear=True", "enable_conv=True", "names=lycoris"]),
    "AdaLoRA": dict(module="adalora", dim=10, args=convolutions(10)),
}


@dataclass(frozen=True, kw_only=True)
class CompareOptions(OptionGroup):
    """Train every network on the embedded base and compare what comes of it."""

    folder: str = option(REQUIRED, "folder for the runs and the table", flag_type="path", is_positional=True)
    max_train_steps: int = option(100, "steps of each run")
    learning_rate: float = option(5e-3, "learning rate; some networks take a part or a multiple of it")

    def check(self) -> list[str]:
        return at_least(self, 1, "max_train_steps")


OPTIONS = CompareOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    folder = Path(options.folder)
    for name, network in NETWORKS.items():
        if not (folder / file_name(name) / "network.safetensors").is_file():
            print(f"training {name}", flush=True)
            train(folder / file_name(name), network, options)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [row(folder, name, options) for name in NETWORKS]
    write_text_whole(folder / "compare.md", "\n".join(lines) + "\n")
    draw(folder)
    print(folder / "compare.md", folder / "compare.png", sep="\n")


def file_name(name: str) -> str:
    return name.lower().replace(", ", "_").replace("-", "_")


def words_of(folder: Path, network: dict[str, Any], options: CompareOptions) -> list[str]:
    """The command line of a run."""
    flags = dict(
        pretrained_model_name_or_path=HERE / "assets/demo_base", train_data_dir=HERE / "assets/demo_pictures/train",
        resolution=",".join(map(str, SIZE_WH)), caption_extension=".txt", output_dir=folder, output_name="network",
        save_precision="fp16", network_module=f"networks.{network['module']}", network_dim=network["dim"],
        network_alpha=network.get("alpha", network["dim"]),
        learning_rate=options.learning_rate * network.get("rate", 1.0), optimizer_type="AdamW", lr_scheduler="cosine",
        lr_warmup_steps=10, train_batch_size=BATCH_SIZE, seed=1, max_train_steps=options.max_train_steps,
        validation_split=0.25, validation_seed=1, validate_every_n_steps=options.max_train_steps,
        sample_prompts=folder / "prompts.txt", sample_every_n_steps=options.max_train_steps,
    ) | network.get("flags", {})  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if network["module"] == "oft":
        words.append("--network_train_unet_only")
    if network["args"]:
        words += ["--network_args", *network["args"]]
    return [*words, "--cache_latents", "--no_report"]


def train(folder: Path, network: dict[str, Any], options: CompareOptions) -> None:
    """One run; UserError where it fails, with the place of what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / "prompts.txt", "\n".join(PROMPTS.values()) + "\n")
    log = folder / "log.txt"
    command = [sys.executable, str(HERE / "train_network.py"), *words_of(folder, network, options)]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise UserError(f"{folder.name} ended with exit code {done.returncode}: see {log}")


def row(folder: Path, name: str, options: CompareOptions) -> str:
    """What the record and the file of a run tell, and what its step needs of memory, as a row of the table."""
    run = folder / file_name(name)
    record = read_json((run / "network-run.json").read_text(encoding="utf-8"))
    path = run / "network.safetensors"
    num_numbers = sum(map(prod, read_header(path, "network").shapes.values()))
    exact = [found.name for found in verify(path, "network").consumers if found.verdict == "exact"]
    needed = memory_of(words_of(run, NETWORKS[name], options))
    cells = (
        f"{record['curves']['validation loss']['points'][-1][1]:.4f}",
        f"{options.learning_rate * NETWORKS[name].get('rate', 1.0):g}",
        f"{record['seconds_a_step']['cpu_p50']:.2f}",
        f"{needed.num_trained:,}",
        f"{num_numbers:,}",
        f"{path.stat().st_size / 1000:,.0f}",
        f"{(needed.trained + needed.step) / 1e6:.1f}",
        ", ".join(exact) or "none",
    )
    return f"| {name} | {' | '.join(cells)} |"


def memory_of(words: list[str]) -> "MemoryEstimate":
    """What the run needs, estimated without running it, so that the machine does not matter."""
    from library.recipes.memory_table import estimate

    return estimate(read_options(TrainNetworkOptions, words), "sd", SIZE_WH, captions_change=False)


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
