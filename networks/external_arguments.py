"""`--network_args` of networks of other projects: what can be told of a mistake before anything is built."""

import difflib
import inspect
import logging
import re
from pathlib import Path
from types import ModuleType

from library.errors import UserError

logger = logging.getLogger(__name__)

# Algorithms and arguments of LyCORIS whose files are read otherwise than they were trained (measured).
READERS = {
    "ia3": "ComfyUI does not apply files of algo=ia3, and the Stable Diffusion WebUI none with convolutions",
    "glora": "the Stable Diffusion WebUI stops at files of algo=glora",
    "dora_wd": "WebUIs apply files of dora_wd=True right only where they were trained with wd_on_output=False",
}


def check_arguments(module: ModuleType, given: dict[str, str]) -> None:
    """UserError for an argument that the module cannot take, and a warning for one that it seems not to read."""
    names, takes_all = known_arguments(module)
    unknown = [name for name in given if name not in names]
    if unknown and not takes_all:
        raise UserError(*(f"--network_args: {module.__name__} has no argument {n}{nearest(n, names)}" for n in unknown))
    for name in unknown if names else ():
        logger.warning("--network_args: %s seems not to read %s%s", module.__name__, name, nearest(name, names))
    if is_lycoris(module):
        check_lycoris_arguments(module, given)


def known_arguments(module: ModuleType) -> tuple[list[str], bool]:
    """The names that `create_network` declares or that its file looks up in **kwargs, and whether it takes others."""
    parameters = inspect.signature(module.create_network).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return names, False
    try:
        source = inspect.getsource(module)
    except OSError:  # compiled
        return [], True
    looked_up = re.findall(rf"""\b{rest}(?:\.get\(|\.pop\(|\[)\s*["'](\w+)["']""", source)
    return [*names, *looked_up, *getattr(module, "deprecated_arg_dict", ())], True


def nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def is_lycoris(module: ModuleType) -> bool:
    return hasattr(module, "network_module_dict") and hasattr(module, "PRESET")


def added_arguments(module: ModuleType, given: dict[str, str]) -> dict[str, bool]:
    """What keeps LyCORIS from listing the layers of other models that its own presets name, and this model has not."""
    return {"warn_on_unmatched": False} if is_lycoris(module) and given.get("preset", "full") in module.PRESET else {}


def warn_of_unused(module: ModuleType, given: dict[str, object]) -> None:
    """Name what LyCORIS does not read where it makes a network of a file."""
    unused = [name for name, value in given.items() if value is not None]
    if unused and is_lycoris(module):
        logger.warning("--network_args: %s: no effect, LyCORIS takes everything from the file", ", ".join(unused))


def check_lycoris_arguments(module: ModuleType, given: dict[str, str]) -> None:
    """UserError for an algorithm or a preset that LyCORIS has not; it would stop in the middle, or train another."""
    algo, preset = (given.get("algo") or "lora").lower(), given.get("preset", "full")
    problems = []
    algorithms = sorted(module.network_module_dict.keys() - {"tlora"})  # which has to be told of every step's timesteps
    if algo not in algorithms:
        problems.append(f"--network_args: algo must be one of {', '.join(algorithms)}, got {algo!r}")
    if preset not in module.PRESET:
        if not Path(preset).is_file():
            presets = ", ".join(module.PRESET)
            problems.append(f"--network_args: preset must be one of {presets}, or a TOML file, got {preset!r}")
        elif module.read_preset(preset) is None:  # which prints the reason
            problems.append(f"--network_args: preset: {preset} is no preset file of LyCORIS, as said above")
    if problems:
        raise UserError(*problems)
    if algo in READERS:
        logger.warning(READERS[algo])
    if is_true(given.get("dora_wd", "False")) and is_true(given.get("wd_on_output", "True")):
        logger.warning(READERS["dora_wd"])


def check_lycoris_ranks(network_dim: int | None, given: dict[str, str]) -> None:
    """UserError for a rank that DyLoRA (arXiv:2210.07558), as LyCORIS has it, cannot divide into its blocks."""
    if (given.get("algo") or "").lower() != "dylora":
        return
    rank, texts = network_dim or 4, [given.get(name) or None for name in ("block_size", "conv_dim")]
    if not all(text is None or text.isdecimal() for text in texts) or texts[0] == "0":
        raise UserError("--network_args: block_size and conv_dim must be whole numbers, block_size above 0")
    block_size = int(texts[0] or 4)
    ranks = {"--network_dim": rank} | ({"--network_args: conv_dim": int(texts[1])} if texts[1] else {})
    problems = [
        f"{name} must be a multiple of {block_size} with algo=dylora, its block_size in --network_args, got {value}"
        for name, value in ranks.items()
        if value % block_size
    ]
    if problems:
        raise UserError(*problems)


def is_true(text: str) -> bool:
    """As LyCORIS reads it."""
    return text.lower() != "false"
