"""An optimizer of PyTorch over `FlatWeights`: a few long vectors instead of hundreds of matrices.

Adam and AdamW treat every number for itself, so the result is the same. What is outside sees the parameters one
by one, with their states, which makes its state the one that the optimizer alone would write and read.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from library.layers.flat import FlatWeights, Span
from library.training.gradients import clip_factor

FUSED = (AdamW, Adam)  # their one-kernel forms also clip, and skip a step, without the host
OWN_WAYS = ("foreach", "fused", "capturable", "differentiable")  # where the user says how, that is how


DEVICES = ("cpu", "cuda")  # elsewhere the one-kernel forms may leave out clipping and skipping


def can_be_flat(optimizer: Optimizer, device: torch.device) -> bool:
    is_free = all(optimizer.defaults.get(way) in (None, False) for way in ("capturable", "differentiable"))
    is_free &= all(optimizer.defaults.get(way) is None for way in ("foreach", "fused"))
    return type(optimizer) in FUSED and is_free and device.type in DEVICES


class FlatOptimizer(Optimizer):
    """Trains the parameters of another optimizer, in its way and with its settings."""

    decides_alone = True  # whether a step is taken, on the device

    def __init__(self, optimizer: Optimizer, weights: FlatWeights):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.kind, self.weights = type(optimizer), weights
        self.inner: Optimizer | None = None  # over the long vectors
        self._num_used = 0  # layers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """A step on the gradients as they are."""
        self._follow()
        self.inner.step()
        self._show_states()

    @torch.no_grad()
    def step_if_finite(self, max_norm: float) -> Tensor:
        """Clip to the norm (0 is no limit) and take a step; where a gradient is no number, change nothing.

        Returns whether the step was taken, on the device: the host does not wait.
        """
        norm = torch.linalg.vector_norm(self.weights.gradients, dtype=torch.float32)
        is_finite = norm.isfinite()
        self._follow()
        self.inner.found_inf = (~is_finite).float()
        self.inner.grad_scale = 1 / clip_factor(norm, max_norm) if max_norm else torch.ones_like(norm)
        self.inner.step()
        self._show_states()
        return is_finite

    def state_dict(self) -> dict[str, Any]:
        """As the other optimizer writes it, in memory of its own for every parameter."""
        return self._state_dict(lambda value: isinstance(value, Tensor))

    def live_state_dict(self) -> dict[str, Any]:
        """The same as training goes on to change it, but for the count of steps, which parameters share here."""
        return self._state_dict(lambda value: isinstance(value, Tensor) and value.ndim == 0)

    def _state_dict(self, is_cloned: Callable[[Any], bool]) -> dict[str, Any]:
        self._show_states(again=True)
        return cloned(self._own_state_dict(), is_cloned)

    def _own_state_dict(self) -> dict[str, Any]:
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner = None  # made anew from what was loaded

    def _follow(self) -> None:
        """Take over the settings of the groups, and parameters that had their first gradient."""
        if self.inner is None or self._num_used < len(self.weights.first_uses):
            self._begin(self.weights.used())
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in ours.items() if name not in ("params", *OWN_WAYS)})

    def _begin(self, used: list[Span]) -> None:
        """Make the vectors, of neighbours in the buffer that are of one group and equally old."""
        self._show_states(again=True)
        self._num_used, self._runs = len(self.weights.first_uses), []
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        groups: list[dict] = [{**group, "params": [], "fused": True} for group in self.param_groups]

        def kind(span: Span) -> tuple:
            index = group_of[id(span.parameter)]
            return index, age_of(self.state.get(span.parameter)), self._form(span)

        for (index, *_), members in groupby(used, kind):
            for spans in neighbours(list(members), self._can_follow):
                run = slice(spans[0].start, spans[-1].padded_stop)
                vector = nn.Parameter(self.weights.values[run])
                vector.grad = self.weights.gradients[run]
                groups[index]["params"].append(vector)
                self._runs.append((vector, spans))
        self.inner = self.kind(groups)
        for vector, spans in self._runs:
            has_state = bool(self.state.get(spans[0].parameter))
            self.inner.state[vector] = (self._joined if has_state else self._fresh_state)(vector, spans)
        self._are_shown = False

    def _form(self, span: Span) -> Any:
        """What else the parameters of one vector have in common."""
        return None

    def _can_follow(self, run: list[Span], span: Span) -> bool:
        """Whether a parameter that lies behind those of a run may be in their vector."""
        return True

    def _fresh_state(self, vector: Tensor, spans: list[Span]) -> dict[str, Any]:
        """The state of a vector before its first step."""
        return {}

    def _joined(self, vector: Tensor, spans: list[Span]) -> dict[str, Any]:
        """The state of a vector from those of its parameters."""
        joined: dict[str, Any] = {}
        for name, value in self.state[spans[0].parameter].items():
            if not isinstance(value, Tensor) or value.ndim == 0:  # old states have plain numbers
                joined[name] = torch.tensor(float(value), dtype=torch.float32, device=vector.device)
                continue
            joined[name] = torch.zeros_like(vector)
            for span in spans:
                start = span.start - spans[0].start
                part = joined[name][start : start + span.parameter.numel()]
                part.copy_(self.state[span.parameter][name].flatten())
        return joined

    def _show_states(self, again: bool = False) -> None:
        """Let every parameter have its part of the vectors' states, once they are there."""
        if self.inner is None or (self._are_shown and not again):
            return
        for vector, spans in self._runs:
            for span in spans:
                start = span.start - spans[0].start
                state = self.inner.state[vector]
                self.state[span.parameter] = {
                    name: self._part(name, value, span, start) for name, value in state.items()
                }
        self._are_shown = True

    def _part(self, name: str, value: Any, span: Span, start: int) -> Any:
        """Of a value in a vector's state what is the parameter's, which begins at `start` of the vector."""
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[start : start + span.parameter.numel()].view(span.parameter.shape)


def age_of(state: dict[str, Any] | None) -> float | None:
    """The steps that a state has seen; None without one."""
    return float(state["step"]) if state and "step" in state else None


def cloned(value: Any, is_cloned: Callable[[Any], bool]) -> Any:
    """A value whose dicts are copies, and so are what in them `is_cloned`."""
    if isinstance(value, dict):
        return {name: cloned(part, is_cloned) for name, part in value.items()}
    return value.clone() if is_cloned(value) else value


def neighbours(spans: list[Span], can_follow: Callable[[list[Span], Span], bool]) -> list[list[Span]]:
    """The spans in stretches without a gap, as far as they go together."""
    stretches: list[list[Span]] = []
    for span in spans:
        if stretches and stretches[-1][-1].padded_stop == span.start and can_follow(stretches[-1], span):
            stretches[-1].append(span)
        else:
            stretches.append([span])
    return stretches
