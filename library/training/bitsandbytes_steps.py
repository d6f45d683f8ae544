"""Steps of the optimizers of bitsandbytes that the host does not wait for.

bitsandbytes waits for the device after each parameter: some four hundred times a step for a LoRA on SD 1.5. Its kernels
run on the stream that training runs on, in the order of their launch, so only paged optimizers need that.
"""

import importlib
import sys

from torch import Tensor
from torch.optim import Optimizer

MODULE = "bitsandbytes.optim.optimizer"


def queue_steps(optimizer: Optimizer) -> None:
    """Leave out the waits in what this optimizer does, if it is one of bitsandbytes and not paged."""
    module = sys.modules.get(MODULE)
    if module is None or not hasattr(module, "sync_gpu") or not isinstance(optimizer, module.Optimizer8bit):
        return
    own = importlib.import_module("bitsandbytes.utils").sync_gpu
    module.sync_gpu = own if optimizer.is_paged else without_waiting


def without_waiting(parameter: Tensor) -> None:
    """Stands in for bitsandbytes' own function."""
