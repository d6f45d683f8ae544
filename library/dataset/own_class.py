"""`--dataset_class`: a dataset class of the user's own, imported by its dotted name. Needs no torch itself."""

import importlib
import os
import sys
from typing import Any

from library.errors import UserError, first_line


def load_own_dataset(options: Any) -> Any:
    """The user's dataset, made as kohya makes it: Class(tokenizer, max_token_length, resolution, debug_dataset).

    The tokenizer is None, since captions travel as text.
    """
    flag = f"--dataset_class {options.dataset_class}"
    module_name, _, class_name = options.dataset_class.rpartition(".")
    if not module_name:
        raise UserError(f"{flag} must be MODULE.CLASS, such as my_pictures.MyDataset for a class in my_pictures.py")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        made = getattr(importlib.import_module(module_name), class_name)(
            None, options.max_token_length, options.resolution, options.debug_dataset
        )
        num_batches = len(made)
    except Exception as error:  # anything may go wrong in code of the user's
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{flag} cannot be used ({reason}); it must be a class in a module that Python finds, made with tokenizer, "
            "max_token_length, resolution and debug_dataset, and have a length: its number of batches"
        ) from error
    if not num_batches:
        raise UserError(f"{flag} has no batches: its length is 0")
    return made
