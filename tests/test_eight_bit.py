"""bitsandbytes' optimizers over long vectors give the bits that they give one parameter after the other."""

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.families.base import AdapterTarget
from library.training.eight_bit import FlatEightBit, can_be_flat_in_8_bits
from networks.lora_adapter import LoraAdapter, LoraNetwork

# inputs, outputs, rank: states in whole blocks, in fp32, in blocks that are not full, and again in whole ones
LAYERS = [(640, 320, 16), (320, 320, 16), (64, 32, 4), (32, 64, 4), (640, 320, 13), (640, 330, 13), (320, 640, 16)]
KINDS = [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.Adam8bit, bitsandbytes.optim.Lion8bit]


def network() -> LoraNetwork:
    torch.manual_seed(0)
    adapters = {}
    for number, (inputs, outputs, rank) in enumerate(LAYERS):
        target = AdapterTarget(f"lora_unet_{number}", nn.Linear(inputs, outputs), "unet")
        adapters[target.name] = LoraAdapter(target, rank, rank)
    found = LoraNetwork(adapters)
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    return found


def groups_of(found: LoraNetwork) -> list[dict]:
    """Rates as LoRA+ sets them."""
    sides = [[getattr(adapter, side).weight for adapter in found.adapters()] for side in ("lora_down", "lora_up")]
    return [{"params": side, "lr": lr} for side, lr in zip(sides, (0.01, 0.05), strict=True)]


def plain(kind: type[Optimizer]) -> tuple[LoraNetwork, Optimizer]:
    found = network()
    return found, kind(groups_of(found), weight_decay=0.1)


def flat(kind: type[Optimizer]) -> tuple[LoraNetwork, FlatEightBit]:
    found, optimizer = plain(kind)
    found.flatten(optimizer.param_groups, torch.float32)
    assert can_be_flat_in_8_bits(optimizer)
    return found, FlatEightBit(optimizer, found.flat)


def train(found: LoraNetwork, optimizer: Optimizer, steps: range, left_out: tuple[int, ...] = ()) -> None:
    """Steps on random gradients, with a rate that changes; some layers have none.

    The gradients turn round after six steps, so that averages become smaller than what would be left in the gaps
    between parameters, were it not 0.
    """
    for step in steps:
        random, factor = torch.Generator().manual_seed(0), 1 + step % 2 if step < 6 else -6
        for number, adapter in enumerate(found.adapters()):
            gradients = [factor * torch.randn(p.shape, generator=random) for p in adapter.parameters()]
            if number in left_out:
                continue
            if isinstance(optimizer, FlatEightBit):
                for span in found.flat.spans:
                    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
                        if span.parameter is parameter:
                            span.sink.mark()
                            span.of(found.flat.gradients).copy_(gradient)
            else:
                for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
                    parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Everything in nested dicts and lists, by where it is."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for n, part in items for key, leaf in leaves(part, f"{name}/{n}").items()}
    return {name: value}


def assert_same(found: tuple[LoraNetwork, Optimizer], right: tuple[LoraNetwork, Optimizer]) -> None:
    """To the bit: weights, and states as they are written."""
    for part, other in zip(found, right, strict=True):
        mine, its = leaves(part.state_dict()), leaves(other.state_dict())
        assert mine.keys() == its.keys()
        for name, value in mine.items():
            same = torch.equal(value, its[name]) if isinstance(value, Tensor) else value == its[name]
            assert same and type(value) is type(its[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_steps_states_and_resumed_steps_are_to_the_bit_those_of_single_parameters(kind):
    one, other = flat(kind), plain(kind)
    for steps in (range(1), range(1, 6)):
        train(*one, steps)
        train(*other, steps)
        assert_same(one, other)
    assert len(one[1]._runs) < len(list(one[0].parameters()))
    for maker in (flat, plain):  # each goes on from the state of the other
        resumed = maker(kind)
        resumed[0].load_state_dict(one[0].state_dict())
        resumed[1].load_state_dict((other if maker is flat else one)[1].state_dict())
        again = plain(kind)
        again[0].load_state_dict(one[0].state_dict())
        again[1].load_state_dict(other[1].state_dict())
        train(*resumed, range(6, 9))
        train(*again, range(6, 9))
        assert_same(resumed, again)


def test_layers_that_have_gradients_later_begin_later():
    one, other = flat(KINDS[0]), plain(KINDS[0])
    for steps, left_out in ((range(2), (1, 2, 4)), (range(2, 4), (4,)), (range(4, 6), ())):
        train(*one, steps, left_out)
        train(*other, steps, left_out)
        assert_same(one, other)


def test_a_state_does_not_change_with_the_steps_that_follow():
    one = flat(KINDS[0])
    train(*one, range(2))
    kept = one[1].state_dict()
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in leaves(kept).items()}
    train(*one, range(2, 4))
    after = leaves(kept)
    assert all(torch.equal(v, after[n]) if isinstance(v, Tensor) else v == after[n] for n, v in before.items())


def test_what_does_not_treat_each_number_for_itself_stays_as_it_is():
    parameters = [nn.Parameter(torch.zeros(8, 8))]
    optim = bitsandbytes.optim
    for made in (optim.PagedAdamW8bit(parameters), optim.LAMB8bit(parameters), optim.AdamW32bit(parameters)):
        assert not can_be_flat_in_8_bits(made)
    assert not can_be_flat_in_8_bits(torch.optim.AdamW(parameters))
