"""Average checkpoints of one run, such as those of its last epochs: often steadier than the last one alone.

python networks/average_lora.py my_lora-000008.safetensors my_lora-000009.safetensors my_lora.safetensors \
    --save_to my_lora_averaged.safetensors
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError, quoted_list, run_script
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.safetensors_header import read_header

logger = logging.getLogger(__name__)

SUFFIXES = ".safetensors", ".pt", ".ckpt"


@dataclass(frozen=True, kw_only=True)
class AverageOptions(OptionGroup):
    """Average checkpoints of one run into one network."""

    files: list[str] = option(REQUIRED, "checkpoints of one run; metadata are the last one's", is_positional=True)
    save_to: str = option(REQUIRED, "the file to write, which must not be there yet", flag_type="path")

    def check(self) -> list[str]:
        problems = [f"there is no file {path}" for path in self.files if not Path(path).is_file()]
        if len({Path(path).resolve() for path in self.files}) < 2:
            problems.append("give at least two different files to average")
        if Path(self.save_to).exists():
            problems.append(f"--save_to: {self.save_to} is there already; give another name")
        if Path(self.save_to).suffix.lower() not in SUFFIXES:
            problems.append(f"--save_to must end in {' or '.join(SUFFIXES)}, got {self.save_to}")
        return problems


OPTIONS = AverageOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    from library.network_files import read_weights, write_weights

    paths = [Path(path) for path in options.files]
    files = [read_weights(path) for path in paths]
    for path, weights in zip(paths[1:], files[1:], strict=True):
        require_same_layers(files[0], weights, path, paths[0])
    means = {n: sum(weights[n].double() for weights in files).div(len(files)).to(x.dtype) for n, x in files[-1].items()}
    is_plain = paths[-1].suffix.lower() != ".safetensors"
    metadata = {} if is_plain else read_header(paths[-1], "the last file").metadata
    Path(options.save_to).parent.mkdir(parents=True, exist_ok=True)
    write_weights(Path(options.save_to), means, None, metadata)
    logger.info("the average of %d files: %s", len(paths), options.save_to)


def require_same_layers(first: dict, other: dict, path: Path, first_path: Path) -> None:
    """UserError unless two files have the same weights in the same sizes, and the same alphas."""
    both = f"{path} and {first_path}"
    if different := sorted(first.keys() ^ other.keys()):
        raise UserError(f"{both} are not of one run: only one of them has {quoted_list(different, 3)}")
    if different := [name for name in other if other[name].shape != first[name].shape]:
        raise UserError(f"{both} are of different ranks, e.g. in {different[0]}; only equal ones can be averaged")
    if different := [name for name in other if name.endswith(".alpha") and not other[name].equal(first[name])]:
        raise UserError(f"{both} are not of one run: {different[0]} differs")


if __name__ == "__main__":
    run_script(main)
