"""A run of training as its folder shows it: its networks, its record, its previews. Needs no torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.files import read_user_text
from library.options.derived import names_prompt_file
from library.options.recorded import FORMAT
from library.safetensors_header import read_header
from library.texts import read_json
from library.training.saving import EXTENSIONS

PATHS = ("pretrained_model_name_or_path", "vae", "train_data_dir", "reg_data_dir", "dataset_config")


@dataclass(frozen=True)
class SavedNetwork:
    """One network file of a run."""

    path: Path
    label: str  # "epoch 5", "step 300", "last"
    epoch: int | None = None
    step: int | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Files of epochs, then of steps, then the last one."""
        is_last = self.epoch is None and self.step is None
        return (2.0 if is_last else 1.0 if self.step else 0.0), float(self.epoch or self.step or 0)


@dataclass(frozen=True)
class Preview:
    """A picture that was drawn while training."""

    path: Path
    when: str  # "epoch 5", "step 300"
    order: int
    number: int  # of its prompt


@dataclass(frozen=True)
class Run:
    """A run's folder and name, and what its record says; an empty record where there is none."""

    folder: Path
    name: str
    record: dict[str, Any]
    networks: list[SavedNetwork]

    def option(self, name: str) -> Any:
        """What the run was told; paths that are not here are looked for where it was started."""
        value = {**self.record.get("defaults", {}), **self.record.get("options", {})}.get(name)
        is_path = name in PATHS or (name == "sample_prompts" and isinstance(value, str) and names_prompt_file(value))
        if not is_path or not isinstance(value, str) or os.path.exists(value):
            return value
        there = os.path.join(self.record.get("working_dir", ""), value)
        return there if os.path.exists(there) else value

    @property
    def grid_folder(self) -> Path:
        return self.folder / f"{self.name}-grid"

    def previews(self) -> list[Preview]:
        """Its previews in order; of one that was drawn twice the later one."""
        start = re.escape(f"{self.name}_") if self.record.get("options", {}).get("output_name") else ""
        pattern = re.compile(start + r"(e?)(\d{6,})_(\d{2,})_(\d{14})(?:_\d+)?\.png")
        folder, found = self.folder / "sample", {}
        for path in sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []:
            if match := pattern.fullmatch(path.name):
                is_epoch, count, number = bool(match[1]), int(match[2]), int(match[3])
                when = f"{'epoch' if is_epoch else 'step'} {count}"
                found[is_epoch, count, number] = Preview(path, when, count, number)
        return [found[key] for key in sorted(found)]


def find_run(text: str, flag: str = "--run") -> Run:
    """The run whose last network is OUTPUT_DIR/NAME, with or without its ending; UserError where there is none."""
    path = Path(text)
    if path.is_dir():
        names = sorted(p.name.removesuffix("-run.json") for p in path.glob("*-run.json"))
        if len(names) != 1:
            which = f"has runs {', '.join(names)}" if names else "has no run of training"
            raise UserError(f"{flag}: the folder {path} {which}; give OUTPUT_DIR/NAME, the run's --output_name last")
        path = path / names[0]
    name = path.name.removesuffix("-run.json")
    if path.suffix in EXTENSIONS.values():
        name = path.stem
    folder = path.parent
    record_path = folder / f"{name}-run.json"
    record = read_record(record_path, flag) if record_path.is_file() else {}
    networks = saved_networks(folder, name)
    if not record and not networks:
        raise UserError(f"{flag}: there is no run {text}: neither {record_path.name} nor {name}.safetensors is there")
    return Run(folder, name, record, networks)


def read_record(path: Path, flag: str) -> dict[str, Any]:
    try:
        record = read_json(read_user_text(path, f"{flag}: {path}"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{flag}: {path} is no record of a run: {error}") from None
    if not isinstance(record, dict) or FORMAT not in record:
        raise UserError(f"{flag}: {path} is no record of a run")
    return record


def saved_networks(folder: Path, name: str) -> list[SavedNetwork]:
    """The network files of a run, in the order of training; `last`, the final file, knows its epoch."""
    found = []
    names = {"epoch": name, "step": name}
    if name == "last":
        names = {"epoch": "epoch", "step": "at"}
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.suffix not in EXTENSIONS.values():
            continue
        if match := re.fullmatch(re.escape(names["epoch"]) + r"-(\d{6,})", path.stem):
            found.append(SavedNetwork(path, f"epoch {int(match[1])}", epoch=int(match[1])))
        elif match := re.fullmatch(re.escape(names["step"]) + r"-step(\d{8,})", path.stem):
            found.append(SavedNetwork(path, f"step {int(match[1])}", step=int(match[1])))
        elif path.stem == name:
            found.append(SavedNetwork(path, _label_of_last(path)))
    return sorted(found, key=lambda saved: saved.order)


def _label_of_last(path: Path) -> str:
    """ "epoch N" where the file says it, else "last"."""
    try:
        metadata = read_header(path, str(path)).metadata if path.suffix == ".safetensors" else {}
    except UserError:
        metadata = {}
    epoch = metadata.get("ss_epoch", "")
    return f"epoch {epoch}" if epoch.isdigit() else "last"
