"""The pictures of a grid: the model is loaded once, networks take turns, and what is drawn stays for another try."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.dataset.file_marks import FileMark
from library.families.base import ModelFamily
from library.families.detect import read_shapes
from library.generating.axes import Axis, Cell
from library.generating.drawing import Artist
from library.generating.models import has_text, is_removable, network_of, prepare
from library.generating.preparation import NetworkFile, module_of
from library.pictures import write_picture

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt")


class Networks(Protocol):
    """What puts networks on a model, one at a time."""

    changes_text: bool  # whether the text encoders may be others after `use`

    def use(self, path: Path | None, strength: float) -> None:
        """Have the model with the network of a file, so strong; None is the model alone."""
        ...


class NetworksInTurn:
    """Networks of files on a model that has none; `end` takes the last one off."""

    def __init__(self, family: ModelFamily, module: str | None, paths: Sequence[Path]):
        self.family, self.module = family, module
        self.network: nn.Module | None = None
        self.path: Path | None = None
        self.changes_text = any(
            name.startswith("lora_te") for path in paths for name in read_shapes(path, "--network_weights")
        )
        prepare(family, text_too=self.changes_text)

    def use(self, path: Path | None, strength: float) -> None:
        if path and path != self.path:
            self._put_on(path)
        if self.network is not None:
            self.network.set_multiplier(strength if path else 0.0)

    def _put_on(self, path: Path) -> None:
        if self.network is not None and not is_removable(self.network):
            self.network.load_weights(path)
        else:
            if self.network is not None:
                self.network.remove()
            self.network = network_of(self.family, NetworkFile(path, self.module or module_of(path)))
            if is_removable(self.network):
                self.network.apply_to()
        self.path = path


class TrainedNetwork:
    """The network that a run has trained, still on the model, with the weights of one file after the other."""

    def __init__(self, network: nn.Module):
        self.network, self.path = network, None
        self.changes_text = has_text(network)

    @torch.no_grad()
    def use(self, path: Path | None, strength: float) -> None:
        if path and path != self.path:
            self.network.load_weights(path)
            self.path = path
        self.network.set_multiplier(strength if path else 0.0)


def cells_of(axes: Sequence[Axis], first: Cell) -> list[Cell]:
    """All cells, the last axis the fastest; a prompt brings settings of its own, which the other axes go before."""
    order = sorted(range(len(axes)), key=lambda number: axes[number].name != "prompt")
    cells = []
    for values in product(*(axis.values for axis in axes)):
        cell = first
        for number in order:
            cell = values[number].change(cell)
        cells.append(cell)
    return cells


def draw_cells(
    artist: Artist, networks: Networks, cells: Sequence[Cell], folder: Path, base: Path
) -> tuple[dict[Cell, Path], int]:
    """The pictures of cells as files in a folder, and how many were drawn now; those that are there stay."""
    paths = {cell: folder / f"{cell_key(cell, artist, base)}.png" for cell in dict.fromkeys(cells)}
    missing = {path: cell for cell, path in paths.items() if not path.is_file()}
    order = sorted(missing.items(), key=lambda item: _turn(item[1]))
    in_use: tuple[Path | None, float] | None = None
    with logging_redirect_tqdm(), tqdm(total=len(paths), initial=len(paths) - len(order), unit="picture") as bar:
        for path, cell in order:
            wanted = _on_model(cell)
            if wanted != in_use:
                networks.use(*wanted)
                if networks.changes_text:
                    artist.forget_text()
                in_use = wanted
            write_picture(path, artist.draw([cell.request])[0].picture)
            bar.update()
    return paths, len(order)


def _on_model(cell: Cell) -> tuple[Path | None, float]:
    """The network and its strength; a strength of 0 is the model alone."""
    return (cell.network.path, cell.strength) if cell.network and cell.strength else (None, 0.0)


def _turn(cell: Cell) -> tuple:
    """So that networks change least often."""
    path, strength = _on_model(cell)
    return str(path or ""), strength, cell.request.prompt


def cell_key(cell: Cell, artist: Artist, base: Path) -> str:
    """A name for a picture: of the model, the network and all that is asked."""
    path, strength = _on_model(cell)
    request = replace(cell.request, enum=0, raw_prompt="", file_name=None)
    family = artist.family
    facts = [base_marks(base), path and _mark(path), strength, asdict(request), artist.default_sampler]
    facts += [str(family.dtype), family.v_prediction, family.options.clip_skip, family.options.vae]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


@cache
def base_marks(base: Path) -> list:
    files = sorted(p for p in base.rglob("*") if p.suffix in WEIGHTS) if base.is_dir() else [base]
    return [_mark(path) for path in files]


@cache
def _mark(path: Path) -> list[int]:
    mark = FileMark.of(path)
    return [mark.num_bytes, mark.ends]
