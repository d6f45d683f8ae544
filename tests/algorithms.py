"""All networks of this suite, found by their files, and the one that CONTRIBUTING.md shows, written as a file."""

import importlib
import re
import tempfile
from pathlib import Path

import networks
from library.errors import UserError
from library.network_rules import rules_of
from library.options.groups import TrainNetworkOptions

ROOT = Path(__file__).parents[1]
FOLDER = tempfile.TemporaryDirectory(prefix="athanor-networks-")  # gone with the process
SHOWN = "networks.ia3"


def shown_source() -> str:
    """The code of the network in CONTRIBUTING.md."""
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    return source


(Path(FOLDER.name) / f"{SHOWN.partition('.')[2]}.py").write_text(shown_source(), encoding="utf-8")
networks.__path__.append(FOLDER.name)

ALGORITHMS = sorted(
    f"networks.{path.stem}"
    for folder in networks.__path__
    for path in Path(folder).glob("*.py")
    if "def create_network" in path.read_text(encoding="utf-8")
)


def arguments_of(algorithm: str) -> dict:
    """What the algorithm takes as `--network_args`."""
    return rules_of(algorithm).ARGUMENTS


def everything(algorithm: str, **others: str) -> dict[str, str]:
    """The arguments with which it adapts all kinds of layers."""
    known = {"conv_dim": "4", "conv_alpha": "2", "enable_conv": "True"} | others
    return {name: value for name, value in known.items() if name in arguments_of(algorithm)}


def takes(algorithm: str, **options: object) -> bool:
    """Whether it goes with these options."""
    check = getattr(rules_of(algorithm), "check_options", None)
    try:
        if check:
            check(TrainNetworkOptions(**options), {})
    except UserError:
        return False
    return True


def has_files(algorithm: str) -> bool:
    """Whether it makes networks of files alone."""
    return hasattr(importlib.import_module(algorithm), "create_network_from_weights")
