"""--deterministic: the same bits from every run on the same machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.errors import UserError, first_line
from library.options.groups import PrecisionOptions

WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which it gives the same bits every time


@contextmanager
def same_bits(options: PrecisionOptions) -> Iterator[None]:
    """With --deterministic take only algorithms that always give the same bits; to be entered before a GPU is used.

    An operation that has no such algorithm is an error: with a warning instead, attention too would take others.
    """
    if not options.deterministic:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]
    chooses_by_speed = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "torch.use_deterministic_algorithms" not in str(error):
            raise
        operation = first_line(error).split(" does not have")[0]
        raise UserError(
            f"--deterministic: torch has no algorithm for {operation} that gives the same bits every time on this "
            "device; leave out --deterministic, or the option that needs it"
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = chooses_by_speed
