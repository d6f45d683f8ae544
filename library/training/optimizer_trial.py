"""Whether an optimizer takes the values of its arguments, tried in a step before there is a model."""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import torch

from library.errors import UserError, first_line
from library.options.derived import optimizer_name
from library.options.groups import OptimizerOptions
from library.training.optimizers import build_optimizer, refusal


def try_optimizer(options: OptimizerOptions, device: torch.device) -> None:
    """UserError for --optimizer_args that the optimizer's first step does not take on this device."""
    if not options.optimizer_args or not (problem := step_problem(options, device)):
        return
    if step_problem(replace(options, optimizer_args=None), device) is None:  # else the arguments are not to blame
        raise UserError(f"{refusal(optimizer_name(options))}: {problem}")


def step_problem(options: OptimizerOptions, device: torch.device) -> str | None:
    """What the optimizer raises in a step of a small weight, None where it takes it."""
    weight = torch.ones(2, 2, requires_grad=True, device=device)
    weight.grad = torch.ones_like(weight)
    group = {"name": "U-Net", "params": [weight], "lr": options.learning_rate}
    try:
        with redirect_stdout(StringIO()):  # some greet
            optimizer, _, _ = build_optimizer(options, [group])
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.step()
    except UserError:
        raise
    except Exception as error:  # whatever a class raises for a value that it has not checked
        return first_line(error)
    return None
