"""--network_module and --network_args, as far as they can be checked without importing torch."""

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

from library.errors import UserError
from library.families.kinds import Shapes
from library.network_rules import rules_without_torch
from library.options.derived import network_arguments, network_module
from library.options.groups import TrainNetworkOptions
from library.training.resuming import convolution_problems, part_problems

PIP_NAMES = {"lycoris": "lycoris-lora"}  # of packages that are imported by another name


def check_network_module(name: str | None) -> list[str]:
    """Problems with --network_module; None stands for networks.lora. Nothing is imported, as that may need torch."""
    if name is None:
        return []
    package, *inside = name.split(".")
    if not all(part.isidentifier() for part in (package, *inside)) or inside[-1:] == ["py"]:
        return [f"--network_module must be a name such as networks.lora, with dots and without .py, got {name!r}"]
    spec = importlib.util.find_spec(package)
    if spec is None:
        pip_name = PIP_NAMES.get(package)
        remedy = (
            f"pip install {pip_name}" if pip_name else "networks of this project are called networks.lora and so on"
        )
        return [f"--network_module {name} needs the package {package}, which is not installed: {remedy}"]
    is_ours = package == "networks"
    above = [] if is_ours else inside[:-1]
    folders = [Path(folder).joinpath(*above) for folder in spec.submodule_search_locations or []]
    there = {path.name.split(".")[0]: path for folder in folders if folder.is_dir() for path in folder.iterdir()}
    if not inside or (inside[-1] in there and not is_ours):
        return []
    if is_ours and len(inside) == 1 and inside[0] in there and makes_networks(there[inside[0]]):
        return []
    if is_ours:
        known = ", ".join(f"networks.{module}" for module, path in sorted(there.items()) if makes_networks(path))
        return [f"--network_module: there is no network {name} here; there is {known}"]
    near = difflib.get_close_matches(inside[-1], there, 1)
    hint = f"; did you mean {'.'.join([package, *inside[:-1], near[0]])}?" if near else ""
    return [f"--network_module: there is no module {name}{hint}"]


def check_network_arguments(options: TrainNetworkOptions, weights: Shapes | None) -> None:
    """`check_by_rules` where the network's rules need no torch."""
    if rules := rules_without_torch(network_module(options)):
        check_by_rules(rules, options, weights)


def check_by_rules(rules: ModuleType, options: TrainNetworkOptions, weights: Shapes | None) -> None:
    """UserError for --network_args that the network cannot take, and --network_weights of other layers or ranks."""
    arguments = network_arguments(options)
    rules.check_arguments(arguments)
    if hasattr(rules, "check_options"):
        rules.check_options(options, arguments)
    if not weights:
        return
    problems = part_problems(options, weights, rules)
    if not options.dim_from_weights and None not in weights.values():
        problems += convolution_problems(weights, rules, arguments)
    if problems:
        file = options.network_weights
        raise UserError(*(f"--network_weights: {file} does not fit this run: {problem}" for problem in problems))
    if not options.dim_from_weights and hasattr(rules, "check_ranks"):
        rules.check_ranks(weights, options.network_weights, options.network_dim, arguments)


def check_network_steps(options: TrainNetworkOptions, num_steps: int) -> None:
    """UserError for --network_args that a run of so many steps cannot do, where the network's rules need no torch."""
    rules = rules_without_torch(network_module(options))
    if hasattr(rules, "check_steps"):
        rules.check_steps(network_arguments(options), num_steps)


def makes_networks(path: Path) -> bool:
    return path.suffix == ".py" and "def create_network" in path.read_text("utf-8")
