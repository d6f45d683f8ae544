"""Random numbers that follow from the step alone, so that trainers that draw them differently train on the same ones.

Noise of a shape and timesteps are the same in every program at the same step, however its generators are seeded and
whatever else it draws. A LoRA's first matrices follow from their sizes. hook.py takes the width from the VAE's
posterior, and the dataset has one picture, so that its order does not matter: the loss curves of programs that compute
the same are then equal but for rounding.
"""

import functools
from collections.abc import Callable

SEED = 20260


def fix(torch, step: Callable[[], int]) -> None:
    """Replace what torch draws noise, timesteps and first weights with; `step` is how many are done."""
    randn, randint, kaiming_uniform = torch.randn, torch.randint, torch.nn.init.kaiming_uniform_

    def generator(*numbers: int):
        seed = SEED
        for number in numbers:
            seed = (seed * 1_000_003 + number) % 2**31
        return torch.Generator().manual_seed(seed)

    def is_latents(shape) -> bool:
        return len(shape) == 4

    @functools.wraps(randn)
    def fixed_randn(*size, **more):
        shape = size[0] if size and not isinstance(size[0], int) else (size or more["size"])
        if not is_latents(shape):
            return randn(*size, **more)
        drawn = randn(tuple(shape), generator=generator(step()))
        return drawn.to(device=more.get("device"), dtype=more.get("dtype"))

    @functools.wraps(torch.randn_like)
    def fixed_randn_like(like, *, dtype=None, device=None, **_):
        if not is_latents(like.shape):
            return randn(like.shape, dtype=dtype or like.dtype, device=device or like.device)
        return randn(like.shape, generator=generator(step())).to(device or like.device, dtype or like.dtype)

    @functools.wraps(randint)
    def fixed_randint(*limits_and_size, **more):
        *limits, size = (*limits_and_size, more["size"]) if "size" in more else limits_and_size
        if len(size) != 1 or "high" in more:
            return randint(*limits_and_size, **more)
        low, high = limits if len(limits) == 2 else (0, *limits)
        drawn = randint(low, high, tuple(size), generator=generator(step(), 1))
        return drawn.to(more["device"]) if more.get("device") is not None else drawn

    @functools.wraps(kaiming_uniform)
    def fixed_kaiming_uniform(tensor, *arguments, **more):
        if tensor.is_meta:
            return tensor
        more.pop("generator", None)
        seeded = generator(*(size for size in tensor.shape if size != 1))
        fresh = kaiming_uniform(torch.empty(tensor.shape), *arguments, generator=seeded, **more)
        with torch.no_grad():
            return tensor.copy_(fresh)

    torch.randn, torch.randn_like, torch.randint = fixed_randn, fixed_randn_like, fixed_randint
    torch.nn.init.kaiming_uniform_ = fixed_kaiming_uniform
