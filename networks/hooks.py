"""What training tells a network and asks of it beside its output; most kinds of networks have nothing to say to it."""

from typing import Any, Protocol

from torch import Tensor


class Kept(Protocol):
    """What a network keeps from step to step beside its weights, and needs to go on."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class TrainingHooks:
    """The answers of a network that neither adds to the loss nor changes between steps."""

    def training_begins(self, num_steps: int, step: int) -> None:
        """At `step` of `num_steps`; UserError where the network's arguments do not fit them."""

    def penalty(self) -> Tensor | None:
        """What the loss of a step has beside that of its pictures, a scalar; None where there is nothing."""
        return None

    def weights_updated(self, taken: Tensor | bool) -> None:
        """After an optimizer step, with its gradients still there; a step that was not taken changed nothing."""

    def kept(self) -> dict[str, Kept]:
        """What goes into a state, by what it is called in messages."""
        return {}
