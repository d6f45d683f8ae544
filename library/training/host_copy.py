"""Numbers of the device on their way to the host, which goes on meanwhile."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor's values; they are waited for when they are asked for."""

    def __init__(self, tensor: Tensor):
        self.values, self.event = tensor.detach(), None
        if tensor.device.type == "cuda":
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor.detach(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> Tensor:
        """The values on the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.values

    def item(self) -> float:
        """The one value there is."""
        return self.read().item()
