"""An exponential moving average of the weights that are trained (--ema): steadier than the last step's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.layers.flat import FlatWeights

DECAY = 0.999  # where --ema_decay is not given


class AverageWeights:
    """Follows the weights step by step, and takes their place where a network is saved and looked at.

    With decay d, the n-th step counts with 1 - min(d, (1 + n) / (10 + n)), so that an average of few steps is not held
    back by what the weights were at the start. It is kept in fp32, and no step waits for the device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], flat: FlatWeights | None, decay: float | None):
        self.decay = DECAY if decay is None else decay
        self.weights = [flat.values] if flat else [parameter.detach() for parameter in parameters]
        self.averages = [value.to(torch.float32, copy=True) for value in self.weights]
        self.num_steps = torch.zeros((), device=self.weights[0].device)
        self.trained: list[Tensor] | None = None  # while the average is in their place
        places = {id(span.parameter): span for span in flat.spans} if flat else {}
        self.parts = [places[id(p)].of(self.averages[0]) for p in parameters] if flat else self.averages

    @torch.no_grad()
    def update(self, taken: Tensor | bool) -> None:
        """Follow a step, unless it was skipped, which only the device may know."""
        if taken is False:
            return
        self.num_steps += taken
        decay = ((1 + self.num_steps) / (10 + self.num_steps)).clamp(max=self.decay)
        share = (1 - decay) * taken
        for average, value in zip(self.averages, self.weights, strict=True):
            average.lerp_(value.float(), share)

    def average(self) -> None:
        """Put the average into the network."""
        if self.trained is None:
            self.trained = [value.clone() for value in self.weights]
            copy_into(self.weights, self.averages)

    def train(self) -> None:
        """Put the weights that are trained back, to the bit."""
        if self.trained is not None:
            copy_into(self.weights, self.trained)
            self.trained = None

    def state_dict(self) -> dict[str, Any]:
        """By parameter, whether they lie in one buffer or not."""
        return {"num_steps": self.num_steps, "averages": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps.copy_(state["num_steps"])
        copy_into(self.parts, state["averages"])


def copy_into(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
