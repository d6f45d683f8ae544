"""Whether latents on disk are of the VAE of this run."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from library.families.base import ModelFamily
from library.training.known_sketches import Sketch, known_sketch

TOLERANCE = 0.05  # relative; the demonstration base's VAE in bf16 is off by 0.005 to 0.009 of itself in fp32
MEAN = "mean"  # the name of the output that is sketched
MAX_DEVIATION = 2.0  # median, in standard deviations; 0.67 for samples of the right distribution


class VaeCheck:
    """What is asked of the VAE of a run; it stays unused until the first question.

    A VAE is known by what it makes of a test picture, not by a hash of its weights. So it is the same in every file
    format and in fp32, fp16 and bf16, and with another decoder, which latents do not depend on.
    """

    def __init__(self, family: ModelFamily):
        self.family = family

    @cached_property
    def sketch(self) -> np.ndarray:
        """Mean latents [C, 4, 4] of the test picture."""
        vae = self.family.vae
        known = known_sketch("VAE", [vae.part], vae.target.dtype, self._of_test_picture)
        return known.values.reshape(known.shapes[MEAN])

    def _of_test_picture(self) -> Sketch:
        mean = self.family.vae.distribution(test_picture()[None])[0][0].cpu().numpy()
        return Sketch(mean.ravel(), {MEAN: mean.shape})

    def made(self, sketch: np.ndarray) -> bool:
        """Whether another sketch is of this VAE."""
        if sketch.shape != self.sketch.shape:
            return False
        return bool(np.linalg.norm(sketch - self.sketch) <= TOLERANCE * np.linalg.norm(self.sketch))

    def may_have_made(self, latents: np.ndarray, image: Tensor) -> bool:
        """Whether latents [C, h, w] can be a sample of what this VAE makes of an image [3, H, W].

        The distance to the mean is counted in standard deviations, widened by the tolerance for other number formats.
        """
        mean, deviation = (value[0].cpu() for value in self.family.vae.distribution(image[None]))
        if mean.shape != latents.shape:
            return False
        allowed = (deviation**2 + (TOLERANCE * mean).square().mean()).sqrt()
        return bool(((torch.from_numpy(latents) - mean).abs() / allowed).median() <= MAX_DEVIATION)


def test_picture() -> Tensor:
    """Waves of several directions and lengths, [3, 32, 32] in [-1, 1]."""
    x = torch.linspace(0, 1, 32)
    y = x[:, None]
    return torch.stack([torch.sin(6 * x + 9 * y), torch.cos(12 * x * y), torch.sin(25 * x - 4 * y)])
