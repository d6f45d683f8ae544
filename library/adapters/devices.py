"""Where singular values are computed."""

from collections.abc import Callable

import torch
from torch import Tensor

from library.errors import UserError, first_line


def mover(device: str | None) -> Callable[[Tensor], Tensor]:
    """What puts a tensor on the device that `--device` names; UserError where there is none of that name."""
    if device is None:
        return lambda tensor: tensor
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {first_line(error)}") from error
    return lambda tensor: tensor.to(device)
