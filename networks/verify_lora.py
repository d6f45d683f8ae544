"""Tell whether ComfyUI, WebUI, Forge and diffusers take every key of adapter files, and apply them exactly.

python networks/verify_lora.py my_lora.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.adapters.verdict_report import report
from library.adapters.verdicts import FileVerdict, verify
from library.errors import EXIT_FINDINGS, UserError, run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class VerifyLoraOptions(OptionGroup):
    """Tell whether ComfyUI, WebUI, Forge and diffusers take every key of adapter files, and apply them exactly.

    The exit code is 0 where all do, and 6 where one does not.
    """

    files: list[str] | None = option(REQUIRED, ".safetensors files of LoRA or other adapters", is_positional=True)
    bake: str | None = option(None, "write the one file as a plain LoRA, which all of them apply", flag_type="path")
    rank: int = option(64, "with --bake: the largest rank of a layer; a smaller one is taken where it is exact")
    model: str | None = option(
        None, "with --bake: the model that it was trained on, which DoRA, OFT, GLoRA and (IA)^3 need", flag_type="path"
    )
    overwrite: bool = option(False, "replace --bake's file where it is there")

    def check(self) -> list[str]:
        files = [*map(Path, self.files or [])]
        problems = [f"files: there is no file {path}" for path in files if not path.is_file()]
        if self.rank < 1:
            problems.append(f"--rank must be above 0, got {self.rank}")
        if not self.bake:
            return problems
        if len(files) > 1:
            problems.append(f"--bake writes one file, got {len(files)} to read")
        if Path(self.bake).suffix.lower() != ".safetensors":
            problems.append(f"--bake must end in .safetensors, got {self.bake}")
        if Path(self.bake).exists() and not self.overwrite:
            problems.append(f"--bake: {self.bake} is there already; --overwrite replaces it")
        return problems


OPTIONS = VerifyLoraOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    found = [verify(Path(file), "files") for file in options.files]
    print("\n\n".join(map(report, found)))
    if options.bake:
        found = [baked(found[0], options)]
        print("\n" + report(found[0]))
    if not all(file.is_exact for file in found):
        sys.exit(EXIT_FINDINGS)


def baked(found: FileVerdict, options: VerifyLoraOptions) -> FileVerdict:
    """Write the plain LoRA, and what becomes of it."""
    if found.needs_model and not options.model:
        raise UserError("--model is needed for --bake: what DoRA, OFT, GLoRA and (IA)^3 change depends on its weights")
    start_logging(LoggingOptions())
    from library.adapters.baking import bake

    bake(found.path, Path(options.bake), options.rank, options.model, found.kind)
    return verify(Path(options.bake), "--bake")


if __name__ == "__main__":
    run_script(main)
