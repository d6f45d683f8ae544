"""What test_kills.py kills: every kind of write of a run, over and over, or whole runs, in forks of this process.

A line of JSON begins a fork: [kind, folder, the file operation to die before or 0, the first round], or
["train", arguments]. It is answered with the process id and, after an empty line, with the exit code. Files tell of
which round they are, so that a file or state made of two is found.
"""

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils import tensorboard  # noqa: F401  for the tracker, so that no fork has to load it

from library.adapters.streaming import write_streamed
from library.dataset import picture_index
from library.dataset.cache import CachedLatents, Origin, write_latents
from library.dataset.caption_files import CaptionFile
from library.dataset.file_marks import FileMark
from library.dataset.index_file import Remembered, packed
from library.dataset.info_cache import write_info
from library.dataset.packed_latents import PackedLatents
from library.dataset.picture_files import Decoded
from library.dataset.text_cache import KEYS, TextOrigin, write_text
from library.files import write_bytes_whole
from library.logs import start_logging
from library.network_files import write_weights
from library.options.config_file import write_config
from library.options.fields import flags_of
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.pictures import write_picture
from library.training.saving import LoopState, remove_state
from library.training.state_files import copy_state
from library.training.trackers import TensorBoard
from train_network import train

SIDE = 300  # of weights and pictures, so that a file takes several writes
OTHER_PLACES = ("/proc", "/sys", "/dev", sys.prefix, sys.base_prefix)
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events


def weights(round_: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((SIDE, SIDE), float(round_)) for name in ("a", "b")}


def network(folder: Path, round_: int) -> None:
    write_weights(folder / "lora.safetensors", weights(round_), None, {"ss_steps": str(round_)})
    write_weights(folder / "lora.pt", weights(round_), None, None)


def model(folder: Path, round_: int) -> None:
    planned = {name: (value.dtype, tuple(value.shape)) for name, value in weights(round_).items()}
    write_streamed(folder / "model.safetensors", planned, weights(round_).__getitem__)


def states() -> Callable[[Path, int], None]:
    """States under one name, each over the one before, and under names of their own, of which two stay."""
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(SIDE, SIDE)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, SIDE)).sum().backward()
    optimizer.step()
    model, optimizer = accelerator.prepare(model, optimizer)

    def write(folder: Path, round_: int) -> None:
        with torch.no_grad():
            model.weight.fill_(round_)
        for moments in optimizer.state.values():
            moments["exp_avg"].fill_(round_)
        for name in ("lora-state", f"lora-{round_:06d}-state"):
            copy_state(accelerator, LoopState(epoch=1, step=round_)).write(folder / name)
        remove_state(folder / f"lora-{round_ - 2:06d}-state")

    return write


def latents(folder: Path, round_: int) -> None:
    array = np.full((4, 128, 96), round_, np.float32)
    write_latents(folder / f"{round_ % 5}.npz", CachedLatents(array, (768, 1024), (0, 0, 768, 1024), array))


def packs(folder: Path, round_: int) -> None:
    """As a run does that finds five pictures changed."""
    files = PackedLatents("sd")
    files.clear_up([str(folder)])
    array = np.full((4, 128, 96), round_, np.float32)
    origin = Origin(FileMark(round_, round_, round_), None, "x", np.zeros((4, 4, 4)))
    for number in range(5):
        cached = CachedLatents(array, (768, 1024), (0, 0, 768, 1024), array)
        files.write(str(folder / f"{number}.npz"), cached, origin)
    files.finish()
    files.tidy([str(folder)])


def text(folder: Path, round_: int) -> None:
    outputs = {key: np.full((77, 768), round_, np.float32) for key in KEYS}
    write_text(folder / f"{round_ % 5}_te_outputs.npz", outputs, TextOrigin("x", np.zeros(4, np.float32)))


def pictures(folder: Path, round_: int) -> None:
    noise = np.random.default_rng(round_).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    write_picture(folder / "sample" / f"{round_ % 5}.png", Image.fromarray(noise))


def config(folder: Path, round_: int) -> None:
    (folder / f"{round_ % 2}.toml").unlink(missing_ok=True)
    options = TrainNetworkOptions(output_name=f"{round_}", network_args=[f"a={round_}"] * 2000)
    write_config(options, flags_of(TrainNetworkOptions), folder / f"{round_ % 2}.toml")


def info(folder: Path, round_: int) -> None:
    write_info(folder, [(str(folder / f"{number}.png"), f"{round_}", (64, 64)) for number in range(2000)])


def index(folder: Path, round_: int) -> None:
    picture = Decoded((64, 64), True, round_, round_, round_, 1, 1)
    caption = CaptionFile(1, 1, "utf-8", f"{round_}" * 20)
    names = [str(number) for number in range(2000)]
    write_bytes_whole(
        folder / picture_index.NAME,
        packed(Remembered(dict.fromkeys(names, picture), dict.fromkeys(names, caption))),
        durable=False,
    )


def logs() -> Callable[[Path, int], None]:
    open_in: list[Path] = []

    def write(folder: Path, round_: int) -> None:
        if not open_in:
            start_logging(LoggingOptions(console_log_file=str(folder / "run.log")))
            open_in.append(folder)
        logging.getLogger("run").info("round %d %s", round_, "x" * 3000)

    return write


def curves() -> Callable[[Path, int], None]:
    trackers: list[TensorBoard] = []

    def write(folder: Path, round_: int) -> None:
        trackers[:] = trackers or [TensorBoard("run", folder, {})]
        trackers[0].log({f"loss/{i}": float(round_) for i in range(50)}, round_)

    return write


KINDS: dict[str, Callable[[], Callable[[Path, int], None]]] = {
    "network": lambda: network,
    "model": lambda: model,
    "state": states,
    "latents": lambda: latents,
    "packs": lambda: packs,
    "text": lambda: text,
    "pictures": lambda: pictures,
    "config": lambda: config,
    "info": lambda: info,
    "index": lambda: index,
    "logs": logs,
    "curves": curves,
}


def die_at(operation: int) -> None:
    """Kill this process before the given operation on files, of which some are named within an open folder."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and not str(arguments[0]).startswith(OTHER_PLACES):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def work(kind: str, folder: Path, operation: int, first_round: int) -> None:
    write = KINDS[kind]()
    (folder / "began").touch()
    if operation:
        die_at(operation)
    for round_ in range(first_round, first_round + 2 if operation else 10**6):
        write(folder, round_)


def obey(kind: str, *arguments) -> None:
    if kind == "train":
        train(*arguments)
    else:
        folder, operation, first_round = arguments
        work(kind, Path(folder), operation, first_round)


def serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            try:
                obey(*json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()  # an empty one: the process id is asked for no more
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
