"""Write an adapter file under the names of another program: kohya's, diffusers', PEFT's.

python networks/convert_lora.py lora.safetensors for_diffusers.safetensors --to diffusers
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class ConvertLoraOptions(OptionGroup):
    """Write an adapter file under the names of another program. Its tensors stay what they are, bit for bit."""

    src_path: str = option(
        REQUIRED, "the file, or a folder with PEFT's files of each model", flag_type="path", is_positional=True
    )
    dst_path: str = option(REQUIRED, "the file to write; a folder for PEFT", flag_type="path", is_positional=True)
    to: str = option(
        REQUIRED,
        "kohya: what all user interfaces know, with LDM's block names for SDXL; kohya_diffusers: the same with "
        "diffusers' block names; diffusers: one file for load_lora_weights; peft: a folder with one for each model",
        choices=("kohya", "kohya_diffusers", "diffusers", "peft"),
    )
    overwrite: bool = option(False, "replace dst_path where it is there")

    def check(self) -> list[str]:
        source, target = Path(self.src_path), Path(self.dst_path)
        problems = [] if source.exists() else [f"src_path: there is no file or folder {source}"]
        if self.to == "peft" and target.suffix:
            problems.append(f"dst_path must be a folder for PEFT, got {target}")
        if self.to != "peft" and target.suffix.lower() != ".safetensors":
            problems.append(f"dst_path must end in .safetensors, got {target}")
        if target.exists() and not self.overwrite:
            problems.append(f"dst_path: {target} is there already; --overwrite replaces it")
        return problems


OPTIONS = ConvertLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.adapters.conversion import convert

    convert(Path(options.src_path), Path(options.dst_path), options.to)


if __name__ == "__main__":
    run_script(main)
