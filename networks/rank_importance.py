"""Which ranks of all layers matter most, by how much the loss would change without them (arXiv:2303.10512, 3.2)."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Ranked(Protocol):
    """What is asked here of an adapter: P [out, r], lambda [r] and Q [r, in], convolutions with their sides behind."""

    lora_up: nn.Module
    lora_lambda: nn.Parameter
    lora_down: nn.Module


class RankImportance:
    """Two moving averages for each number: of its sensitivity |w dL/dw|, and of how uncertain that is (eqs. 8-10)."""

    def __init__(self, adapters: Sequence[Ranked], beta1: float, beta2: float):
        self.adapters, self.beta1, self.beta2 = list(adapters), beta1, beta2
        triples = [(adapter.lora_up.weight, adapter.lora_lambda, adapter.lora_down.weight) for adapter in adapters]
        self.parameters: list[nn.Parameter] = [parameter for triple in triples for parameter in triple]
        self.sensitivities = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters]
        self.uncertainties = [torch.zeros_like(value) for value in self.sensitivities]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Follow the gradients of a step; layers that had none, as dropout leaves them out, stay as they are."""
        here = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not here:
            return
        now = torch._foreach_mul(
            [self.parameters[i].detach().float() for i in here], [self.parameters[i].grad.float() for i in here]
        )
        torch._foreach_abs_(now)
        sensitivities, uncertainties = ([of[i] for i in here] for of in (self.sensitivities, self.uncertainties))
        torch._foreach_lerp_(sensitivities, now, 1 - self.beta1)
        torch._foreach_sub_(now, sensitivities)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(uncertainties, now, 1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Of each rank of each adapter, [r]: that of its lambda, and the means of its column and its row (eq. 7)."""
        scores = torch._foreach_mul(self.sensitivities, self.uncertainties)
        return [
            up.flatten(1).mean(0) + of_lambda + down.flatten(1).mean(1)
            for up, of_lambda, down in zip(scores[::3], scores[1::3], scores[2::3], strict=True)
        ]

    @torch.no_grad()
    def chosen(self, count: int) -> list[Tensor]:
        """1 for the ranks that are among the `count` most important ones of all layers, else 0; by layer, [r]."""
        scores = self.scores()
        joined = torch.cat(scores)
        marks = torch.zeros_like(joined).scatter_(0, joined.topk(count).indices, 1.0)
        return list(marks.split([len(score) for score in scores]))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "sensitivities": self.sensitivities, "uncertainties": self.uncertainties}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name in ("sensitivities", "uncertainties"):
            for own, value in zip(getattr(self, name), state[name], strict=True):
                own.copy_(value)
