"""Pictures while training: prompts drawn by the model as it is, seeded, without touching training's randomness."""

import inspect
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.families.base import Conds, ModelFamily
from library.pictures import labelled_sheet, write_picture
from library.training.prompts import SamplePrompt

logger = logging.getLogger(__name__)

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DPM_SOLVER = dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")

# name -> class of diffusers and what it is built with
SAMPLERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", DPM_SOLVER),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def build_sampler(name: str, v_prediction: bool):
    """The diffusers scheduler of a sampler's name."""
    class_name, arguments = SAMPLERS[name]
    prediction_type = "v_prediction" if v_prediction else "epsilon"
    return getattr(diffusers, class_name)(**SCHEDULE, prediction_type=prediction_type, **arguments)


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Seed all generators for a picture, and give training its randomness back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for index, state in enumerate(cuda_states):
            torch.cuda.set_rng_state(state, index)


@torch.no_grad()
def draw(family: ModelFamily, prompt: SamplePrompt, default_sampler: str) -> Image.Image:
    """One picture: classifier-free guidance (arXiv:2207.12598) over the sampler's steps, decoded by the VAE."""
    with own_randomness(prompt.seed):
        scheduler = build_sampler(prompt.sample_sampler or default_sampler, family.v_prediction)
        scheduler.set_timesteps(prompt.sample_steps)
        noise = torch.randn(1, 4, prompt.height // 8, prompt.width // 8)  # on the CPU: the same on every device
        latents = noise.to(family.device) * scheduler.init_noise_sigma
        conds = family.prompt_conds(prompt.prompt, prompt.negative_prompt)
        latents = denoised(family, scheduler, latents, conds, Guidance(prompt.scale))
        image = family.vae.decode(latents)
    warn_of_black(prompt.prompt, latents, image)
    return to_picture(image)


def warn_of_black(prompt: str, latents: Tensor, image: Tensor) -> None:
    """Say where a picture is no numbers, and what makes it so."""
    if not image.isfinite().all():
        which = "the VAE makes NaN of it; --no_half_vae helps" if latents.isfinite().all() else "the model gives NaN"
        logger.warning("the picture of %r is black: %s", shorten(prompt, 60), which)


@dataclass(frozen=True)
class Guidance:
    """How the answers to prompts are put together; with a `negative_scale` there is an empty prompt as the third."""

    scale: float
    negative_scale: float | None = None

    @property
    def num_prompts(self) -> int:
        return 2 if self.negative_scale is None else 3

    def __call__(self, positive: Tensor, negative: Tensor, empty: Tensor | None = None) -> Tensor:
        if self.negative_scale is None:
            return negative + self.scale * (positive - negative)
        return empty + self.scale * (positive - empty) - self.negative_scale * (negative - empty)


def denoised(
    family: ModelFamily,
    scheduler,
    latents: Tensor,
    conds: Conds,
    guidance: Guidance,
    timesteps: Tensor | None = None,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Latents [B, 4, h, w] after the sampler's steps; `conds` are of all prompts, then all negative ones, and so on.

    The noise that some samplers add is torch's own, or that of a generator for each picture.
    """
    takes_generators = generators and "generator" in inspect.signature(scheduler.step).parameters
    more = {"generator": generators} if takes_generators else {}
    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        repeated = scheduler.scale_model_input(torch.cat([latents] * guidance.num_prompts), timestep)
        now = timestep.to(family.device).expand(len(repeated))
        with torch.autocast(family.device.type, family.dtype, enabled=family.dtype != torch.float32):
            answers = family.predict(repeated, now, conds).float().chunk(guidance.num_prompts)
        latents = scheduler.step(guidance(*answers), timestep, latents, return_dict=False, **more)[0]
    return latents


def to_picture(image: Tensor) -> Image.Image:
    """A PIL picture of [1, 3, H, W] in [-1, 1]; NaN is black."""
    pixels = ((image[0].float().nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_samples(
    family: ModelFamily, prompts: list[SamplePrompt], default_sampler: str, folder: Path, name: str | None, when: str
) -> list[Path]:
    """Draw all prompts into `folder`; `when` is e000001 or 000100. Returns the files written."""
    paths = []
    for prompt in prompts:
        picture = draw(family, prompt, default_sampler)
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        prefix = f"{name}_" if name else ""
        path = folder / f"{prefix}{when}_{prompt.enum:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"
        write_picture(path, picture)
        paths.append(path)
    return paths


def before_after_sheet(
    family: ModelFamily, network: nn.Module, prompts: list[SamplePrompt], default_sampler: str
) -> Image.Image:
    """The prompts without (above) and with (below) the network, the same seeds in both rows."""
    prompts = [prompt if prompt.seed is not None else replace(prompt, seed=prompt.enum) for prompt in prompts]
    rows = []
    for multiplier in (0.0, 1.0):
        network.set_multiplier(multiplier)
        rows.append([draw(family, prompt, default_sampler) for prompt in prompts])
    return labelled_sheet(rows, ["without", "with"], [prompt.prompt for prompt in prompts])
