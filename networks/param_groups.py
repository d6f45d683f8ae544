"""How a network's parameters are grouped for the optimizer, under the names that kohya logs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from networks.patterns import Pattern, matching

TEXT_ENCODERS = ("te", "te1", "te2")


class Trained(Protocol):
    """What an adapter tells of itself here."""

    name: str
    part: str
    block: int | None

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def plus_parameters(self) -> list[nn.Parameter]: ...


@dataclass(frozen=True)
class LearningRateRules:
    """What sets learning rates apart within a part of the model."""

    loraplus_ratios: dict[str, float] = field(default_factory=dict)  # by "textencoder" and "unet"
    block_weights: Sequence[float] | None = None  # factors on the U-Net's rate, by block
    pattern_rates: Sequence[Pattern] = ()  # rates of layers by their names; they go before those of parts and blocks


def param_groups(
    adapters: Sequence[Trained], text_encoder_lr: float | Sequence[float], unet_lr: float, rules: LearningRateRules
) -> list[dict]:
    """Optimizer groups with `params`, `lr` and `name`; what has rate 0 is left out.

    The rate of the text encoders is one for all of them, or one for each.
    """
    groups, adapters = groups_of_patterns(adapters, rules)
    unet = [adapter for adapter in adapters if adapter.part == "unet"]
    for name, members, lr in by_text_encoder(adapters, text_encoder_lr):
        groups += with_plus(name, members, lr, rules.loraplus_ratios.get("textencoder"))
    for block, members in by_block(unet, rules).items():
        name = "unet" if block is None else f"unet_block{block}"
        weight = 1.0 if block is None else rules.block_weights[block]
        groups += with_plus(name, members, unet_lr * weight, rules.loraplus_ratios.get("unet"))
    return groups


def groups_of_patterns(adapters: Sequence[Trained], rules: LearningRateRules) -> tuple[list[dict], list[Trained]]:
    """Groups of the adapters that have rates by their names, and the adapters that have none."""
    members: dict[tuple[str, str, float], list[Trained]] = {}
    others = []
    for adapter in adapters:
        if pattern := matching(rules.pattern_rates, adapter.name):
            part = "unet" if adapter.part == "unet" else "textencoder"
            members.setdefault((part, pattern.expression.pattern, pattern.value), []).append(adapter)
        else:
            others.append(adapter)
    groups = []
    for (part, expression, rate), found in members.items():
        groups += with_plus(f"{part} {expression}", found, rate, rules.loraplus_ratios.get(part))
    return groups, others


def by_text_encoder(
    adapters: Sequence[Trained], lr: float | Sequence[float]
) -> Iterator[tuple[str, list[Trained], float]]:
    """Name, adapters and rate of what is trained of the text encoders: all in one, or each with its own rate."""
    parts = [part for part in TEXT_ENCODERS if any(adapter.part == part for adapter in adapters)]
    if isinstance(lr, float | int) or len(parts) == 1:
        rate = lr if isinstance(lr, float | int) else lr[0]
        yield "textencoder", [adapter for adapter in adapters if adapter.part in parts], rate
        return
    for number, (part, rate) in enumerate(zip(parts, lr, strict=False), start=1):
        yield f"textencoder {number}", [adapter for adapter in adapters if adapter.part == part], rate


def by_block(adapters: Sequence[Trained], rules: LearningRateRules) -> dict[int | None, list[Trained]]:
    """Adapters by block, in the order of the model; all under None where blocks have no rates of their own."""
    blocks: dict[int | None, list[Trained]] = {}
    for adapter in adapters:
        blocks.setdefault(adapter.block if rules.block_weights else None, []).append(adapter)
    return blocks


def with_plus(name: str, adapters: Sequence[Trained], lr: float, ratio: float | None) -> Iterator[dict]:
    """The group of these adapters, and with LoRA+ (arXiv:2402.12354) a second one of the output's side."""
    plus = [p for adapter in adapters for p in adapter.plus_parameters()] if ratio else []
    set_of_plus = set(plus)
    usual = [p for adapter in adapters for p in adapter.parameters() if p not in set_of_plus]
    if lr and usual:
        yield {"params": usual, "lr": lr, "name": name}
    if lr and plus:
        yield {"params": plus, "lr": lr * ratio, "name": f"{name} plus"}
