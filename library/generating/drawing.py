"""Pictures drawn as asked: in batches, from noise or from a picture, at once or by way of a smaller one.

B batch, H W pixels, h w latent cells.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from library.dataset.images import load_image
from library.families.base import Conds, ModelFamily, Sizes
from library.generating.options import PictureFlags
from library.generating.requests import PictureRequest
from library.training.sampling import Guidance, build_sampler, denoised, to_picture, warn_of_black

logger = logging.getLogger(__name__)

USUAL_STRENGTH = 0.8
MAX_CONDS = 512  # prompts whose conditioning is kept
FIRST_STAGE_STEP = 32  # pixels; sides of first, small pictures are multiples of it


@dataclass(frozen=True)
class Highres:
    """How a large picture is made of a small one."""

    scale: float
    steps: int
    strength: float | None
    in_latents: bool


@dataclass(frozen=True)
class Drawn:
    """A picture with what was asked for it."""

    request: PictureRequest
    picture: Image.Image
    is_first_stage: bool = False


def highres_of(options: PictureFlags) -> Highres | None:
    if not options.highres_fix_scale:
        return None
    return Highres(
        options.highres_fix_scale,
        options.highres_fix_steps,
        options.highres_fix_strength,
        options.highres_fix_latents_upscaling,
    )


class Artist:
    """Draws pictures with a model; conditioning of the prompts used last is kept until the networks change."""

    def __init__(self, family: ModelFamily, default_sampler: str, highres: Highres | None = None):
        self.family, self.default_sampler, self.highres = family, default_sampler, highres
        self._conds: dict[tuple, Conds] = {}

    def forget_text(self) -> None:
        """Text encoders have changed."""
        self._conds.clear()

    @torch.no_grad()
    def draw(self, requests: Sequence[PictureRequest]) -> list[Drawn]:
        """Pictures that agree in all but prompt, seed and picture to begin with; small ones of highres come first."""
        first = requests[0]
        seeds = [request.seed for request in requests]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # noise of the CPU: alike on all devices
        later = generators
        if self.family.device.type != "cpu":
            later = [torch.Generator(self.family.device).manual_seed(seed) for seed in seeds]
        noise = _Noise(self.family, generators, later)
        if not self.highres:
            latents = self._stage(requests, noise, self._begin_with(requests))
            return [Drawn(request, self._decoded(request, latents[i : i + 1])) for i, request in enumerate(requests)]
        small = [_smaller(request, self.highres) for request in requests]
        latents = self._stage(small, noise, self._begin_with(small))
        drawn = [Drawn(s, self._decoded(s, latents[i : i + 1]), True) for i, s in enumerate(small)]
        latents = self._enlarged([one.picture for one in drawn], latents, first)
        large = [replace(r, strength=self.highres.strength or r.strength or USUAL_STRENGTH) for r in requests]
        latents = self._stage(large, noise, latents)
        return drawn + [Drawn(r, self._decoded(r, latents[i : i + 1])) for i, r in enumerate(requests)]

    def _stage(self, requests: Sequence[PictureRequest], noise: "_Noise", begin_with: Tensor | None) -> Tensor:
        """Latents of pictures from noise, or from latents that are drawn anew in part."""
        first = requests[0]
        scheduler = build_sampler(first.sample_sampler or self.default_sampler, self.family.v_prediction)
        scheduler.set_timesteps(first.sample_steps)
        latents = noise.latents(first.height // 8, first.width // 8)  # [B, 4, h, w]
        timesteps = scheduler.timesteps
        if begin_with is None:
            latents = latents * scheduler.init_noise_sigma
        else:
            strength = USUAL_STRENGTH if first.strength is None else first.strength
            num_steps = int(first.sample_steps * strength)
            if not num_steps:
                return begin_with
            start = (first.sample_steps - num_steps) * getattr(scheduler, "order", 1)
            timesteps = timesteps[start:]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)
            latents = scheduler.add_noise(begin_with, latents, timesteps[:1])
        guidance = Guidance(first.scale, first.negative_scale)
        conds = self._conds_of(requests, guidance)
        return denoised(self.family, scheduler, latents, conds, guidance, timesteps, noise.later)

    def _conds_of(self, requests: Sequence[PictureRequest], guidance: Guidance) -> Conds:
        """All prompts, then all negative prompts, then the empty ones where the guidance has them."""
        of_each = [self._conds_of_one(request, guidance) for request in requests]
        if len({value.shape for conds in of_each for value in conds.values()}) > len(of_each[0]):  # longer and shorter
            texts, sizes = zip(*(_asked(request, guidance) for request in requests), strict=True)
            rows = None if sizes[0] is None else list(itertools.chain(*zip(*sizes, strict=True)))
            return self.family.prompt_conds(*itertools.chain(*zip(*texts, strict=True)), sizes=rows)
        return {
            name: torch.stack([conds[name] for conds in of_each], dim=1).flatten(0, 1) for name in of_each[0]
        }  # [prompts, B, ...] -> [prompts B, ...]

    def _conds_of_one(self, request: PictureRequest, guidance: Guidance) -> Conds:
        texts, sizes = key = _asked(request, guidance)
        if key not in self._conds:
            if len(self._conds) >= MAX_CONDS:
                self._conds.clear()
            self._conds[key] = self.family.prompt_conds(*texts, sizes=sizes)
        return self._conds[key]

    def _begin_with(self, requests: Sequence[PictureRequest]) -> Tensor | None:
        if requests[0].image_path is None:
            return None
        size = requests[0].width, requests[0].height
        pictures = [Image.fromarray(load_image(request.image_path)) for request in requests]
        return self._encoded([picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures])

    def _enlarged(self, pictures: list[Image.Image], latents: Tensor, request: PictureRequest) -> Tensor:
        """Latents of the full size, of small pictures or of their latents."""
        if self.highres.in_latents:
            size_hw = (request.height // 8, request.width // 8)
            return F.interpolate(latents, size_hw, mode="bilinear", align_corners=False)
        size = request.width, request.height
        return self._encoded([picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures])

    def _encoded(self, pictures: list[Image.Image]) -> Tensor:
        """Scaled latents [B, 4, h, w]: the means of the VAE's distributions."""
        pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]) / 127.5 - 1
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        means = [self.family.vae.distribution(image[None])[0] for image in images]
        return torch.cat(means) * self.family.vae.scale

    def _decoded(self, request: PictureRequest, latents: Tensor) -> Image.Image:
        image = self.family.vae.decode(latents)
        warn_of_black(request.prompt, latents, image)
        return to_picture(image)


class _Noise:
    """The random numbers of a batch, from a generator for each picture."""

    def __init__(self, family: ModelFamily, generators: list[torch.Generator], later: list[torch.Generator]):
        self.family, self.generators = family, generators
        self.later = later  # for samplers that add noise on the way, on the device

    def latents(self, height: int, width: int) -> Tensor:
        noise = [torch.randn(1, 4, height, width, generator=generator) for generator in self.generators]
        return torch.cat(noise).to(self.family.device)


def _asked(request: PictureRequest, guidance: Guidance) -> tuple[tuple[str, ...], Sizes | None]:
    """The texts that the model is asked for a picture, and their sizes where these are given."""
    texts = (request.prompt, request.negative_prompt, "")[: guidance.num_prompts]
    return texts, request.sizes and (*request.sizes, request.sizes[1])[: guidance.num_prompts]


def _smaller(request: PictureRequest, highres: Highres) -> PictureRequest:
    """What is drawn first; its sides are multiples of 32."""
    sides = (int(side * highres.scale + 0.5) for side in (request.width, request.height))
    width, height = (max(64, side - side % FIRST_STAGE_STEP) for side in sides)
    return replace(request, width=width, height=height, sample_steps=highres.steps)


def batches_of(requests: Sequence[PictureRequest], size: int) -> Iterator[list[PictureRequest]]:
    """Pictures in their order, in batches of those that follow each other and can be drawn together."""
    batch: list[PictureRequest] = []
    for request in requests:
        if batch and (len(batch) == size or _kind(request) != _kind(batch[0])):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _kind(request: PictureRequest) -> PictureRequest:
    """A picture without what may differ within a batch."""
    return replace(request, prompt="", negative_prompt="", raw_prompt="", seed=0, enum=0, file_name=None,
                   image_path=request.image_path and "")  # fmt: skip
