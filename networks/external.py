"""Networks of other projects, such as `lycoris.kohya`: modules with kohya's `create_network`, which takes whole models.

What such a network is asked for, and in which order, is what kohya's scripts ask.
"""

import copy
import inspect
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from library.errors import UserError, quoted_list
from library.families.base import KohyaModels
from library.files import failed_writes_told, temporary_folder
from library.network_files import read_weights, write_weights
from library.options.groups import NetworkOptions
from networks.base import require_finite, require_same
from networks.external_arguments import (
    added_arguments,
    check_arguments,
    check_lycoris_ranks,
    is_lycoris,
    warn_of_unused,
)
from networks.hooks import TrainingHooks

logger = logging.getLogger(__name__)


class ExternalAlgorithm:
    """A module of another project as an algorithm."""

    def __init__(self, module: ModuleType):
        self.module = module

    def check_arguments(self, network_args: dict[str, str]) -> None:
        check_arguments(self.module, network_args)

    def check_ranks(self, network_dim: int | None, network_args: dict[str, str]) -> None:
        if is_lycoris(self.module):
            check_lycoris_ranks(network_dim, network_args)

    def network_on_models(
        self, models: KohyaModels, options: NetworkOptions, network_args: dict[str, str]
    ) -> "ExternalNetwork":
        """The network attached to the models, with --network_weights where given."""
        with class_attributes_kept(self.module), refusals_told(self.module):
            create = self._network_of_file if options.dim_from_weights else self._new_network
            network = create(models, options, {"dropout": options.network_dropout} | network_args)
            if options.scale_weight_norms and not limits_norms(network):
                raise UserError(f"--scale_weight_norms is not for this network of {self.module.__name__}")
            parts = not options.network_train_unet_only, not options.network_train_text_encoder_only
            network.apply_to(models.text_encoder, models.unet, *parts)
            external = ExternalNetwork(network, models)
            if options.network_weights:
                external.load_weights(Path(options.network_weights), made_of_it=options.dim_from_weights)
        return external

    def _new_network(self, models: KohyaModels, options: NetworkOptions, network_args: dict) -> nn.Module:
        return self.module.create_network(
            1.0, options.network_dim, options.network_alpha, models.vae, models.text_encoder, models.unet,
            neuron_dropout=options.network_dropout, **added_arguments(self.module, network_args), **network_args,
        )  # fmt: skip

    def _network_of_file(self, models: KohyaModels, options: NetworkOptions, network_args: dict) -> nn.Module:
        if not hasattr(self.module, "create_network_from_weights"):
            raise UserError(f"--dim_from_weights is not for --network_module {self.module.__name__}")
        warn_of_unused(self.module, network_args)
        read_weights(Path(options.network_weights))  # so that no code of a pickle runs where the module would let it
        made = self.module.create_network_from_weights(
            1.0, options.network_weights, models.vae, models.text_encoder, models.unet, **network_args
        )
        return made[0] if isinstance(made, tuple) else made


@contextmanager
def class_attributes_kept(module: ModuleType) -> Iterator[None]:
    """Put back what a network sets on its classes, such as a preset: it would be there for the next network too."""
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    kept = [(kind, name, copy.copy(value)) for kind in classes for name, value in vars(kind).items() if name.isupper()]
    try:
        yield
    finally:
        for kind, name, value in kept:
            setattr(kind, name, value)


def limits_norms(network: nn.Module) -> bool:
    """Whether the network can; LyCORIS has the method for all algorithms, and some of their layers do nothing."""
    layers = getattr(network, "loras", ())
    does_something = not layers or any("apply_max_norm" in vars(type(layer)) for layer in layers)
    return hasattr(network, "apply_max_norm_regularization") and does_something


@contextmanager
def refusals_told(module: ModuleType) -> Iterator[None]:
    """A UserError where the module stops at what it was given."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--network_module {module.__name__} stopped at --network_args or a file: {reason}") from error


@dataclass(frozen=True)
class ExternalLayer:
    """The parameters that the network has for one layer."""

    part: str  # "unet", "te", "te1", "te2"
    weights: list[nn.Parameter]

    def parameters(self) -> list[nn.Parameter]:
        return self.weights


@dataclass(frozen=True)
class ReportedNorms:
    """What the network says of norms that it limited."""

    num_scaled: float
    mean: float
    largest: float

    def values(self) -> Tensor:
        """[3], as of `LimitedNorms`."""
        return torch.tensor([float(self.num_scaled), float(self.largest), float(self.mean)])

    def logged(self, values: Tensor | None = None) -> dict[str, float]:
        """What kohya logs, under its names."""
        names = "max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm"
        return dict(zip(names, (self.values() if values is None else values).tolist(), strict=True))


class ExternalNetwork(TrainingHooks, nn.Module):
    """A network of another project behind the methods of `AdapterNetwork`."""

    file_is_known = False  # only the network itself knows what its file has

    def __init__(self, network: nn.Module, models: KohyaModels):
        super().__init__()
        self.network = network
        self._models = models  # no module, so that the frozen models are no children
        self.eval()  # `train()` tells the network that an epoch starts

    def adapters(self) -> list[ExternalLayer]:
        layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            layers.setdefault(name.partition(".")[0], []).append(parameter)
        return [ExternalLayer(part_of(name), own) for name, own in layers.items()]

    def set_multiplier(self, multiplier: float) -> None:
        if not hasattr(self.network, "set_multiplier"):
            name = type(self.network).__name__
            raise UserError(
                f"{name} has no set_multiplier: nothing can be drawn or compared without it (--before_after)"
            )
        self.network.set_multiplier(multiplier)

    def limit_norms(self, max_norm: float, wanted: Tensor | bool = True) -> ReportedNorms:
        """Called after steps that were taken alone: those of other projects' networks the host knows of."""
        device = next(self.parameters()).device
        return ReportedNorms(*self.network.apply_max_norm_regularization(max_norm, device))

    def train(self, mode: bool = True) -> "ExternalNetwork":
        starts = mode and not self.training
        super().train(mode)
        if starts and hasattr(self.network, "on_epoch_start"):
            self.network.on_epoch_start(self._models.text_encoder, self._models.unet)
        return self

    def param_groups(self, text_encoder_lr: float | Sequence[float], unet_lr: float) -> list[dict]:
        """Optimizer groups with `params`, `lr` and `name` (as kohya logs them); what has rate 0 is left out."""
        if not isinstance(text_encoder_lr, float | int):
            raise UserError("--text_encoder_lr: a network of another project takes one rate for all text encoders")
        if hasattr(self.network, "prepare_grad_etc"):
            self.network.prepare_grad_etc(self._models.text_encoder, self._models.unet)
        kept = [g for g in self._groups(text_encoder_lr, unet_lr) if g["params"] and g["lr"]]
        trained = {id(parameter) for group in kept for parameter in group["params"]}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return kept

    def _groups(self, text_encoder_lr: float, unet_lr: float) -> list[dict]:
        """What the network answers, with what it may leave out: rates and names."""
        prepare = self.network.prepare_optimizer_params
        rates = (text_encoder_lr, unet_lr, unet_lr)[: num_positional(prepare)]  # the third stands in for what lacks
        answer = prepare(*rates)
        groups, names = answer if isinstance(answer, tuple) else (answer, None)
        groups = [group | {"params": list(group["params"])} for group in groups]
        of_text_encoder = {id(p) for layer in self.adapters() if layer.part != "unet" for p in layer.weights}
        are_text = [all(id(p) in of_text_encoder for p in group["params"]) for group in groups]
        return [
            {"lr": text_encoder_lr if is_text else unet_lr} | group | {"name": name}
            for group, is_text, name in zip(groups, are_text, names or names_of_groups(are_text), strict=True)
        ]

    def save_weights(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        weights, metadata = self._own_file(Path(path), metadata or {})
        write_weights(Path(path), weights, dtype, metadata)

    def _own_file(self, path: Path, metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Weights and metadata as the network itself writes them; only it knows what its file has."""
        with failed_writes_told(path), temporary_folder(path) as folder:
            own = folder / "network.safetensors"
            self.network.save_weights(str(own), None, {name: str(value) for name, value in metadata.items()})
            with safe_open(own, "pt") as file:
                metadata = metadata | (file.metadata() or {})
            return safetensors.torch.load(own.read_bytes()), metadata  # not mapped, so that Windows can remove it

    def load_weights(self, path: Path, made_of_it: bool = False) -> None:
        """Take weights from a file; all its keys must belong here and fit, and all of ours must be in it.

        A network that was made of the file may have them already, and some add them a second time.
        """
        weights = read_weights(path)
        require_same(own := self._own_weights(), weights, path)
        if made_of_it and are_near(own, weights):
            return
        require_same_alphas(own, weights, path)
        self.network.load_weights(str(path))
        if not are_near(self._own_weights(), weights):
            raise UserError(f"--network_weights: {type(self.network).__name__} did not take the weights of {path}")

    def _own_weights(self) -> dict[str, Tensor]:
        return self._own_file(Path(tempfile.gettempdir()) / "network", {})[0]

    def check_saved(self, path: Path) -> int:
        """Read a file back; returns the number of layers of the model that it changes."""
        weights = read_weights(path)
        require_finite(weights, path)
        layers = {name.partition(".")[0] for name in weights}
        strangers = sorted(layers - layer_names(self._models))
        if strangers:
            logger.warning("%s has weights for no layer of the model: %s", path, quoted_list(strangers, 3))
        return len(layers) - len(strangers)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """All tensors as they are, for --resume: what the network itself gives is its file, which may be rounded."""
        named = (*self.network.named_parameters(), *self.network.named_buffers())
        return {name: tensor.detach() for name, tensor in named}

    @torch.no_grad()
    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False) -> tuple[list[str], list[str]]:
        """Takes the tensors that are here, and answers which are missing and which are unknown."""
        own = self.state_dict()
        for name in own.keys() & state_dict.keys():
            own[name].copy_(state_dict[name])
        return [name for name in own if name not in state_dict], [name for name in state_dict if name not in own]


def part_of(name: str) -> str:
    """The part of the model that a layer is in, by its name in the file: "unet", "te", "te1", "te2"."""
    return name.removeprefix("lora_").partition("_")[0]


def layer_names(models: KohyaModels) -> set[str]:
    """Names that layers have in files."""
    if isinstance(models.text_encoder, list):
        roots = {f"lora_te{index}": encoder for index, encoder in enumerate(models.text_encoder, start=1)}
    else:
        roots = {"lora_te": models.text_encoder}
    roots["lora_unet"] = models.unet
    return {f"{prefix}_{path}".replace(".", "_") for prefix, root in roots.items() for path, _ in root.named_modules()}


def num_positional(function) -> int:
    """How many arguments in a row a function takes."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 3
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def names_of_groups(are_text: Sequence[bool]) -> list[str]:
    """Names for logs of groups that the network does not describe: by part where there is one of each, else numbers."""
    names = ["textencoder" if is_text else "unet" for is_text in are_text]
    return names if len(set(names)) == len(names) else [f"group{index}" for index in range(len(names))]


def are_near(own: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Whether weights are the same up to rounding; alphas do not count, a network may tell them otherwise."""
    names = [name for name in weights if not name.endswith(".alpha")]
    difference = sum((own[name].float().flatten() - weights[name].float().flatten()).square().sum() for name in names)
    return bool(difference <= 1e-4 * sum(weights[name].float().square().sum() for name in names))


def require_same_alphas(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """UserError where a file has another alpha: a network may take it and go on with the scale of its own."""
    for name, value in weights.items():
        if name.endswith(".alpha") and not torch.allclose(value.float(), own[name].float(), rtol=1e-2):
            alphas = f"{value.item():g} in {path} and {own[name].item():g} here"
            raise UserError(f"--network_weights: {name} is {alphas}; give --network_alpha (and conv_alpha) as it was")
