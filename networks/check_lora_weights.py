"""Show how much each layer of an adapter file changes, and which layers are empty or hold numbers that are none.

python networks/check_lora_weights.py my_lora.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import EXIT_FINDINGS, counted, quoted_list, run_script
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option

if TYPE_CHECKING:
    from library.adapters.weight_facts import LayerFacts


@dataclass(frozen=True, kw_only=True)
class CheckLoraWeightsOptions(OptionGroup):
    """Show how much each layer of an adapter file changes. The exit code is 6 where a layer is empty or broken."""

    file: str = option(REQUIRED, "a file of a LoRA or another adapter", flag_type="path", is_positional=True)
    show_all_keys: bool = option(
        False, "show every tensor too: its shape, mean, least and largest absolute value", spellings=("-s",)
    )

    def check(self) -> list[str]:
        return [] if Path(self.file).is_file() else [f"file: there is no file {self.file}"]


OPTIONS = CheckLoraWeightsOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    from library.adapters.file import open_adapter
    from library.adapters.weight_facts import facts_of, tensor_facts

    file = open_adapter(Path(options.file), "file")
    if options.show_all_keys:
        for key in file.weights:
            fact = tensor_facts(key, file.weights[key])
            print(f"{key}, {'x'.join(map(str, fact.shape))}, {fact.mean:.4g}, {fact.smallest:.4g}, {fact.largest:.4g}")
    facts = list(facts_of(file))
    for fact in facts:
        print(f"{fact.name}: {_described(fact)}")
    _print_groups(facts)
    if not _healthy(facts, file.leftovers):
        sys.exit(EXIT_FINDINGS)


def _described(fact: "LayerFacts") -> str:
    rank = "" if fact.rank is None else f", rank {fact.rank}"
    alpha = "" if fact.alpha is None else f", alpha {fact.alpha:g}"
    norm = "broken: not all are numbers" if fact.is_broken else "norm by the model's weight"
    if fact.norm is not None:
        norm = f"norm {fact.norm:.4g}"
    return f"{fact.label}{rank}{alpha}, {norm}{', empty' if fact.is_empty else ''}"


def _print_groups(facts: list["LayerFacts"]) -> None:
    """A row for each part of the model: its layers, and the mean, least and largest norm of what they change."""
    groups: dict[str, list[LayerFacts]] = {}
    for fact in facts:
        groups.setdefault(fact.group, []).append(fact)
    print(f"\n{'part':<24}{'layers':>8}{'mean norm':>12}{'least':>12}{'largest':>12}")
    for group, members in groups.items():
        norms = [fact.norm for fact in members if fact.norm is not None]
        numbers = (sum(norms) / len(norms), min(norms), max(norms)) if norms else ()
        print(f"{group:<24}{len(members):>8}" + "".join(f"{number:>12.4g}" for number in numbers))


def _healthy(facts: list["LayerFacts"], leftovers: list[str]) -> bool:
    """Say what is wrong, and whether nothing is."""
    ranks = sorted({fact.rank for fact in facts if fact.rank is not None})
    print(f"\n{counted(len(facts), 'layer')}, ranks: {quoted_list([str(rank) for rank in ranks]) or 'none'}")
    found = {
        "hold numbers that are none (training diverged)": [fact.name for fact in facts if fact.is_broken],
        "are empty, and change nothing": [fact.name for fact in facts if fact.is_empty],
        "are of no adapter that is known here": leftovers,
    }
    for what, names in found.items():
        if names:
            print(f"{len(names)} {what}: {quoted_list(names, 3)}")
    return not any(found.values())


if __name__ == "__main__":
    run_script(main)
