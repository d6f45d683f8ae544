"""What test_processes.py runs in each of two processes: the loop on a toy of known gradients, then whole runs."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from torch import Tensor, nn

from library.dataset.dataset import TrainingDataset
from library.families.base import Batch
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.preflight import preflight
from library.training import outcomes
from library.training.gradients import SeparateGradients
from library.training.loop import run
from library.training.network_recipe import NetworkRecipe
from library.training.precision import build_accelerator
from library.training.saving import LoopState
from train_network import train


class ToyRecipe:
    """A loss that only the batch decides; a part of the model has gradients for some pictures only, one has none."""

    def __init__(self):
        torch.manual_seed(0)
        self.usual, self.rare, self.idle = (nn.Linear(3, 1) for _ in range(3))

    def backward(self, batch: Batch, accumulation: int) -> Tensor:
        loss = self.loss(batch) * batch.share.weight
        (loss / accumulation).backward()
        return loss.detach()

    def gradients(self) -> SeparateGradients:
        return SeparateGradients(self.parameters())

    def loss(self, batch: Batch) -> Tensor:
        colour = batch.images.mean(dim=(2, 3))
        output = self.usual(colour)
        marked = torch.tensor([["number 0" in caption] for caption in batch.captions])
        if marked.any():
            output = output + self.rare(colour) * marked
        return (output - 1).square().mean()

    def parameters(self) -> list[nn.Parameter]:
        return [*self.usual.parameters(), *self.rare.parameters(), *self.idle.parameters()]

    def learning_rates(self) -> dict[str, float]:
        return {}

    def metrics(self) -> Callable[[], dict[str, float]]:
        return dict

    def training_mode(self) -> None: ...

    def weights_updated(self, taken: bool) -> None: ...

    def step_finished(self, state: LoopState) -> None: ...

    def epoch_finished(self, state: LoopState) -> None: ...


def toy_weights(arguments: list[str]) -> tuple[Tensor, Accelerator]:
    """The toy's weights after a run of the real loop over the real dataset."""
    options = read_options(TrainNetworkOptions, arguments)
    checked = preflight(options)
    plan, recipe, accelerator = checked.plan, ToyRecipe(), build_accelerator(options)
    optimizer = torch.optim.SGD(recipe.parameters(), lr=0.1, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    dataset = TrainingDataset(checked.scanned, options, options.seed, plan.max_train_steps)
    sampler = dataset.sampler(plan.accumulation, plan.num_processes)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    run(recipe, dataset, sampler, optimizer, scheduler, accelerator, options, plan, LoopState(seed=options.seed))
    return torch.cat([parameter.detach().flatten() for parameter in recipe.parameters()]), accelerator


def watch_files(written: list[str]) -> None:
    """Have every file that this process opens for writing, or puts in its place, added to the list."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(arguments[0])
        elif event == "os.rename":
            written.append(str(arguments[1]))

    sys.addaudithook(hook)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState.destroy_process_group = lambda *_: None  # the next run needs it
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    outcomes.LATE["cpu"] = given.get("late", 0)
    facts = {"written": []}
    watch_files(facts["written"])
    if "toy" in given:
        weights, accelerator = toy_weights(given["toy"])
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        facts["weights"] = accelerator.gather(weights[None]).tolist()
        facts["timeout"] = group.options._timeout.total_seconds()
    rank = os.environ["RANK"]
    for arguments in given["runs"]:
        train([word.replace("RANK", rank) for word in arguments])
    Path(f"{given['facts']}-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    if "dies" in given:
        if rank == "1":
            NetworkRecipe.epoch_finished = lambda *_: os._exit(9)
        train(given["dies"])
