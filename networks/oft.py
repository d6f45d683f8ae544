"""OFT (arXiv:2306.07280), block-diagonal: the outputs of a layer are turned in groups, and its bias is not.

A weight W [out, in] becomes R^T W, where R is orthogonal and made of `--network_dim` blocks: each is Cayley's
(I + Q) (I - Q)^-1 of a skew-symmetric Q = B - B^T. `--network_alpha`, times the number of outputs, limits the norm of
all Q of a layer. R^T (W x + b) - R^T b + b needs no weight, so any frozen layer will do.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.network_files import read_weights
from networks.base import Adapter, AdapterNetwork, build_adapters, under_our_names, without_bias
from networks.oft_arguments import DEFAULT_NUM_BLOCKS, read
from networks.oft_arguments import check_arguments as check_arguments

logger = logging.getLogger(__name__)

EPSILON = 1e-8
DEFAULT_LIMIT = 1e-3  # alpha where none is given; the flag's default is 1, as kohya's
LYCORIS_PREFIX, KOHYA_PREFIX = "lora_unet_", "oft_unet_"
ATTENTION = re.compile(r"_attn[12]_to_(q|k|v|out_0)$")
TRANSFORMER = re.compile(r"(_transformer_blocks_\d+_\w+|_proj_in|_proj_out)$")


class OftAdapter(Adapter):
    """B of all blocks of one layer, named oft_blocks in files."""

    def __init__(self, target: AdapterTarget, num_blocks: int, alpha: int | float):
        super().__init__(target, None)
        layer = target.layer
        self.num_outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if self.num_outputs % num_blocks:
            raise UserError(
                f"--network_dim {num_blocks}: the number of blocks must divide the {self.num_outputs} outputs of "
                f"{target.name}"
            )
        size = self.num_outputs // num_blocks
        self.blocks_shape = num_blocks, size
        self.oft_blocks = nn.Parameter(torch.zeros(num_blocks, size, size))
        self.register_buffer("alpha", torch.tensor(alpha))
        self.refresh()

    def refresh(self) -> None:
        """Follow an alpha that was loaded from a file."""
        self.largest_norm = None if self.alpha.is_meta else self.alpha.item() * self.num_outputs

    def limited(self) -> Tensor:
        """B in fp32, scaled down where the norm of Q is larger than it may be; alpha 0 sets no limit."""
        blocks = self.oft_blocks.float()
        if not self.largest_norm:
            return blocks
        norm = (blocks - blocks.mT).norm()
        return blocks * ((norm.clamp(max=self.largest_norm) + EPSILON) / (norm + EPSILON))

    def turn(self) -> Tensor:
        """R - I [blocks, size, size] in fp32: 2 Q (I - Q)^-1, exactly 0 at the start."""
        skew = self.limited()
        skew = skew - skew.mT
        identity = torch.eye(self.blocks_shape[1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(identity - skew, 2 * skew)  # both are polynomials in Q, so they commute

    def forward(self, x: Tensor) -> Tensor:
        output = self.base_output(x)
        if self.multiplier == 0:
            return output
        return output + self.multiplier * self.turned(output)

    def turned(self, output: Tensor) -> Tensor:
        """(R - I)^T of a layer's output without its bias."""
        turn, free = self.turn().to(output.dtype), without_bias(output, self.base)
        if isinstance(self.base, nn.Linear):
            return torch.einsum("knm,...kn->...km", turn, free.unflatten(-1, self.blocks_shape)).flatten(-2)
        return torch.einsum("knm,bkn...->bkm...", turn, free.unflatten(1, self.blocks_shape)).flatten(1, 2)

    def delta_weight(self) -> Tensor:
        weight = self.base.weight
        blocks = weight.float().unflatten(0, self.blocks_shape).flatten(2)
        return torch.einsum("knm,kni->kmi", self.turn(), blocks).reshape(weight.shape)


class OftNetwork(AdapterNetwork):
    """OFT under kohya's names, or under those of LyCORIS, which other programs read.

    ComfyUI takes alpha for the largest norm itself, so files with LyCORIS' names hold blocks that are limited already,
    and alpha 0, which is no limit everywhere.
    """

    def __init__(self, adapters: dict[str, Adapter], names: str):
        super().__init__(adapters)
        self.file_is_state_dict = names == "kohya"

    def file_weights(self) -> dict[str, Tensor]:
        weights = self.state_dict()
        if self.file_is_state_dict:
            return weights
        for name, adapter in self.named_children():
            weights[f"{name}.oft_blocks"] = adapter.limited().detach()
            weights[f"{name}.alpha"] = torch.tensor(0.0)
        return weights

    def take_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        """The same; alpha 0, of a file with LyCORIS' names, is that of this network."""
        own = self.state_dict()
        limits = {name: value for name, value in own.items() if name.endswith(".alpha") and name in weights}
        super().take_weights(weights | {name: v for name, v in limits.items() if weights[name] == 0}, path)

    def load_weights(self, path: Path) -> None:
        self.take_weights(under_our_names(read_weights(path), other_names(self.named_children())), path)


def other_names(layers: Iterable[tuple[str, Adapter | AdapterTarget]]) -> dict[str, str]:
    """The names that layers have in networks, by all others that they may have in files."""
    found = {}
    for name, layer in layers:
        bare = name.removeprefix(KOHYA_PREFIX).removeprefix(LYCORIS_PREFIX)
        found |= {layer.other_name: name, f"{KOHYA_PREFIX}{bare}": name, f"{LYCORIS_PREFIX}{bare}": name}
    return found


def create_network(
    targets: list[AdapterTarget],
    network_dim: int | None,
    network_alpha: int | float | None,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> AdapterNetwork:
    """An OFT network on the attention layers of the U-Net, and on what `network_args` add."""
    given = read(network_args)
    names = given.get("names", "kohya")
    num_blocks, alpha = network_dim or DEFAULT_NUM_BLOCKS, DEFAULT_LIMIT if network_alpha is None else network_alpha
    wanted = [target for target in targets if is_wanted(target, given)]
    warn_of_consumers(names)
    adapters = build_adapters(under_names(wanted, names), lambda target: OftAdapter(target, num_blocks, alpha))
    return OftNetwork(adapters, names)


def create_network_from_weights(
    targets: list[AdapterTarget], path: Path, neuron_dropout: float | None = None, **network_args: str
) -> AdapterNetwork:
    """The network of a file: its layers, numbers of blocks, alphas, weights and, where none are given, names."""
    given, found = read(network_args), read_weights(path)
    if unused := [name for name in ("enable_all_linear", "enable_conv") if name in given]:
        logger.warning("--network_args: %s: no effect, the layers are those of %s", ", ".join(unused), path)
    names = given.get("names", "kohya" if any(name.startswith(KOHYA_PREFIX) for name in found) else "lycoris")
    targets = under_names([target for target in targets if target.part == "unet"], names)
    weights = under_our_names(found, other_names((target.name, target) for target in targets))

    def make(target: AdapterTarget) -> OftAdapter | None:
        blocks = weights.get(f"{target.name}.oft_blocks")
        if blocks is None:
            return None
        alpha = weights.get(f"{target.name}.alpha", torch.tensor(0.0)).flatten()[0].item()
        return OftAdapter(target, len(blocks), alpha)

    network = OftNetwork(build_adapters(targets, make), names)
    network.take_weights(weights, path)
    return network


def wants_convolutions(network_args: dict[str, str]) -> bool:
    """Whether residual blocks and samplers are to be adapted too."""
    return read(network_args).get("enable_conv", False)


def is_wanted(target: AdapterTarget, given: dict[str, Any]) -> bool:
    """Whether a layer is trained: those of attention are, others of transformers and what is outside on request."""
    if target.part != "unet":
        return False
    if ATTENTION.search(target.name):
        return True
    return given.get("enable_all_linear" if TRANSFORMER.search(target.name) else "enable_conv", False)


def under_names(targets: list[AdapterTarget], names: str) -> list[AdapterTarget]:
    """The targets with the names that they are to have in files."""
    if names == "lycoris":
        return targets
    return [replace(target, name=target.name.replace(LYCORIS_PREFIX, KOHYA_PREFIX, 1)) for target in targets]


def warn_of_consumers(names: str) -> None:
    """A line about which programs read the file."""
    if names == "kohya":
        logger.warning(
            "networks.oft: files with kohya's names (oft_unet_...) are read by the WebUI for SDXL alone, by ComfyUI "
            "not at all; with --network_args names=lycoris both read them, for all models"
        )
