"""What every adapter algorithm shares: being attached to layers, grouped for the optimizer, saved and merged.

An algorithm is one file beside this one. It knows one layer: it subclasses `Adapter`, and offers `create_network`.
Names in files come from the family (`AdapterTarget.name`), so `state_dict()` of a network is the file.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import UserError, quoted_list
from library.families.base import AdapterTarget
from library.layers.flat import FlatWeights, Sink, flat_weights
from library.layers.frozen import is_adapted, make_plain
from library.network_files import read_weights, write_weights
from networks.hooks import TrainingHooks
from networks.param_groups import LearningRateRules, param_groups

logger = logging.getLogger(__name__)


class Adapter(nn.Module):
    """The change of one layer. Subclasses hold the weights and fill in `delta` and `delta_weight`."""

    def __init__(self, target: AdapterTarget, module_dropout: float | None):
        super().__init__()
        self.name, self.part, self.block, self.other_name = target.name, target.part, target.block, target.other_name
        self.input = target.input
        self.multiplier = 1.0
        self.module_dropout = module_dropout
        self._base = [target.layer]  # in a list, so that the frozen layer is not a child of the network
        self._base_forward: Callable[[Tensor], Tensor] | None = None
        self.is_stacked = False  # on a layer that has another adapter already

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def attach(self) -> None:
        """Make the base layer add this adapter's change to its output."""
        self.is_stacked = is_adapted(self.base)
        self._base_forward = self.base.forward
        self.base.forward = self.forward

    def detach(self) -> None:
        """Give the base layer the forward that it had; of several adapters the last one goes first."""
        if self._base_forward is None:
            return
        if self.is_stacked:
            self.base.forward = self._base_forward
        else:
            del self.base.forward
        self._base_forward = None

    def forward(self, x: Tensor) -> Tensor:
        output = self.base_output(x)
        if self.multiplier == 0 or self._is_dropped():
            return output
        return output + self.multiplier * self.delta(x).to(output.dtype)

    def base_output(self, x: Tensor) -> Tensor:
        """What the layer gives without this adapter. Its class may have changed since the adapter was attached."""
        return self._base_forward(x) if self.is_stacked else type(self.base).forward(self.base, x)

    def _is_dropped(self) -> bool:
        return bool(self.training and self.module_dropout and torch.rand(1).item() < self.module_dropout)

    def delta(self, x: Tensor) -> Tensor:
        """The change of the layer's output, at multiplier 1."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The same as a change of the layer's weight, in the weight's shape."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Follow what was loaded from a file and is no parameter, such as alpha."""

    def flat_parameters(self) -> list[nn.Parameter]:
        """Those for `use_flat`; none where the algorithm leaves gradients to autograd, or steps leave the layer out."""
        return []

    def use_flat(self, values: list[Tensor], gradients: list[Tensor]) -> Sink:
        """Compute with these copies of the parameters while training, and add their gradients to those."""
        raise NotImplementedError

    def plus_parameters(self) -> list[nn.Parameter]:
        """The parameters that LoRA+ gives a higher learning rate (arXiv:2402.12354): those on the output's side."""
        return []

    def norm(self) -> Tensor:
        """The Frobenius norm of the change of the weight, a scalar."""
        return self.delta_weight().float().norm()

    def rescale(self, factor: Tensor) -> None:
        """Multiply the change by a factor, in equal parts on its parameters: the change is linear in each of them."""
        parameters = list(self.parameters())
        root = factor ** (1 / len(parameters))
        for parameter in parameters:
            parameter.mul_(root)

    @torch.no_grad()
    def merge(self, multiplier: float = 1.0) -> None:
        """Add the change to the base layer's weight; in fewer bits, where it was, most of it would be rounded away."""
        make_plain(self.base)
        weight = self.base.weight
        weight.copy_(weight.float() + multiplier * self.delta_weight().to(weight.device, torch.float32))


@dataclass(frozen=True)
class LimitedNorms:
    """What `limit_norms` did; it stays on the device until somebody asks."""

    norms: Tensor  # [adapters], those of the changes as they are now
    scaled: Tensor  # [adapters], whether they were larger before

    def values(self) -> Tensor:
        """How many were scaled, the largest norm and the mean, [3] on the device."""
        return torch.stack([self.scaled.float().sum(), self.norms.max(), self.norms.mean()])

    def logged(self, values: Tensor | None = None) -> dict[str, float]:
        """What kohya logs, under its names; of `values` that are on the host already where they are given."""
        num_scaled, largest, mean = (self.values() if values is None else values).tolist()
        return {"max_norm/keys_scaled": num_scaled, "max_norm/max_key_norm": largest, "norm/avg_key_norm": mean}


class AdapterNetwork(TrainingHooks, nn.Module):
    """Adapters on all targets of a model; each is a child under its name in the file."""

    file_is_known = True  # so that whoever has a copy of `live_file_weights` can write it
    file_is_state_dict = True

    def __init__(self, adapters: dict[str, Adapter], rules: LearningRateRules | None = None):
        super().__init__()
        self.rules = rules or LearningRateRules()
        self.flat: FlatWeights | None = None
        for name, adapter in adapters.items():
            self.add_module(name, adapter)

    def adapters(self) -> list[Adapter]:
        return list(self.children())

    def apply_to(self) -> None:
        for adapter in self.adapters():
            adapter.attach()

    def remove(self) -> None:
        """Take the adapters off the model again."""
        for adapter in self.adapters():
            adapter.detach()

    def set_multiplier(self, multiplier: float) -> None:
        for adapter in self.adapters():
            adapter.multiplier = multiplier

    def merge(self, multiplier: float = 1.0) -> None:
        """Add all changes to the model's weights, for good."""
        for adapter in self.adapters():
            adapter.merge(multiplier)

    @torch.no_grad()
    def limit_norms(self, max_norm: float, wanted: Tensor | bool = True) -> LimitedNorms:
        """Scale every change down to `max_norm` where its norm is larger (`--scale_weight_norms`).

        Nothing changes where `wanted` is false, which only the device may know.
        """
        norms = self.norms()
        bounded = norms.clamp(min=max_norm / 2)  # so that a new network's 0 divides nothing
        ratios = bounded.clamp(max=max_norm) / bounded
        if wanted is not True:
            ratios = torch.where(wanted, ratios, 1.0)
        self.rescale(ratios)
        return LimitedNorms(norms * ratios, ratios != 1)

    def norms(self) -> Tensor:
        """The Frobenius norms of the changes of weights, [adapters]."""
        return torch.stack([adapter.norm() for adapter in self.adapters()])

    def rescale(self, ratios: Tensor) -> None:
        """Multiply each change by its ratio, [adapters]."""
        for adapter, ratio in zip(self.adapters(), ratios.unbind(), strict=True):
            adapter.rescale(ratio)

    def param_groups(self, text_encoder_lr: float | Sequence[float], unet_lr: float) -> list[dict]:
        """Optimizer groups with `params`, `lr` and `name` (as kohya logs them); a part with rate 0 is left out."""
        return param_groups(self.adapters(), text_encoder_lr, unet_lr, self.rules)

    def flatten(self, groups: Sequence[dict], dtype: torch.dtype) -> None:
        """Keep the parameters of optimizer groups in one buffer, where that can be; layers compute in `dtype`."""
        self.flat = flat_weights(self.adapters(), groups, dtype)

    def save_weights(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        write_weights(Path(path), self.file_weights(), dtype, metadata)

    def file_weights(self) -> dict[str, Tensor]:
        """What stands in files; another thing than the state where `file_is_state_dict` is false."""
        return self.state_dict()

    def load_weights(self, path: Path) -> None:
        """Take weights from a file; all its keys must belong here and fit, and all of ours must be in it."""
        names = {adapter.other_name: name for name, adapter in self.named_children()}
        self.take_weights(under_our_names(read_weights(Path(path)), names), path)

    def take_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        """The same with weights that were read from `path` before."""
        own = self.state_dict()
        require_same(own, weights, path)
        self.load_state_dict({name: value.reshape(own[name].shape) for name, value in weights.items()})

    def check_saved(self, path: Path) -> int:
        """Read a file back and compare it with this network; returns the number of layers it changes."""
        weights = read_weights(Path(path))
        require_same(self.file_weights(), weights, path)
        require_finite(weights, path)
        return len(self.adapters())

    def live_weights(self) -> dict[str, Tensor]:
        """The state, as training goes on to change it."""
        return super().state_dict()

    def live_file_weights(self) -> dict[str, Tensor]:
        """What stands in files, as training goes on to change it, or made for this."""
        return self.live_weights() if self.file_is_state_dict else self.file_weights()

    def state_dict(self, *args, **kwargs):
        """The weights, each in memory of its own: programs that write files take parts of one buffer for one tensor."""
        found = super().state_dict(*args, **kwargs)
        for name, value in found.items():
            if value.untyped_storage().nbytes() > value.nbytes:
                found[name] = value.clone()
        return found

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        result = super().load_state_dict(state_dict, strict, assign)
        for adapter in self.adapters():
            adapter.refresh()
        return result


def under_our_names(weights: dict[str, Tensor], names: dict[str | None, str]) -> dict[str, Tensor]:
    """The weights of a file whose layers may have the names of another program: `names` has ours by these."""
    layers = ((*name.partition("."), value) for name, value in weights.items())
    return {f"{names.get(layer, layer)}{dot}{rest}": value for layer, dot, rest, value in layers}


def build_adapters(
    targets: Iterable[AdapterTarget], make: Callable[[AdapterTarget], Adapter | None]
) -> dict[str, Adapter]:
    """Adapters by name for the targets that the algorithm wants (it answers None for others)."""
    made = ((target.name, make(target)) for target in targets)
    return {name: adapter for name, adapter in made if adapter is not None}


def over_outputs(numbers: Tensor, layer: nn.Module) -> Tensor:
    """One number for each output of a layer, in a shape that what it gives can be multiplied with."""
    return numbers.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else numbers.view(-1)


def without_bias(output: Tensor, layer: nn.Module) -> Tensor:
    """What a layer gives less its bias."""
    return output if layer.bias is None else output - over_outputs(layer.bias, layer)


def is_pointwise(layer: nn.Module) -> bool:
    """A Linear, or a convolution of 1x1: what `network_dim` (not `conv_dim`) is for."""
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


def require_same(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """UserError unless the weights of a file are a network's own, name for name and size for size."""
    unknown = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    misshapen = [n for n, value in weights.items() if n in own and value.numel() != own[n].numel()]
    problems = []
    if unknown:
        problems.append(f"{path} has {len(unknown)} weights that this network has not: {quoted_list(unknown, 3)}")
    if missing:
        problems.append(f"{path} lacks {len(missing)} weights of this network: {quoted_list(missing, 3)}")
    if misshapen:
        name = misshapen[0]
        sizes = f"{tuple(weights[name].shape)} where this network has {tuple(own[name].shape)}"
        problems.append(f"{path} was made with other ranks or for another model, e.g. {name}: {sizes}")
    if problems:
        raise UserError(*problems)


def require_finite(weights: dict[str, Tensor], path: Path) -> None:
    """UserError where a file holds weights that are no numbers."""
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds weights that are not finite, e.g. {broken[0]}: training diverged; "
            "take an earlier checkpoint, and a lower learning rate"
        )
