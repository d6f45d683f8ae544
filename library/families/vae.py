"""The VAE of a model as training asks it: pictures to latents, and back for previews."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from library.families.checkpoint_files import Target
from library.families.parts import Part


class Vae:
    """A frozen VAE; it comes to the device when it is used, and leaves it at `release`."""

    def __init__(self, part: Part, scale: float, target: Target):
        self.part, self.target = part, target
        self.scale = scale  # of latents as the U-Net sees them

    @property
    def model(self) -> AutoencoderKL:
        return self.part.loaded(self.target)

    def encode(self, images: Tensor, noise_like: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latents [B, C, h, w], not scaled, sampled from the posterior of images [B, 3, H, W] in [-1, 1].

        `noise_like` draws standard normal noise in the shape and number format of the mean; torch's own is the default.
        """
        posterior = self._posterior(images)
        if noise_like is None:
            return posterior.sample().float()
        return (posterior.mean + posterior.std * noise_like(posterior.mean)).float()

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [B, C, h, w] each, of what `encode` samples from."""
        posterior = self._posterior(images)
        return posterior.mean.float(), posterior.std.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] around [-1, 1] of scaled latents [B, C, h, w]."""
        return self.model.decode((latents / self.scale).to(self.target.dtype)).sample

    def release(self) -> None:
        """Take the VAE off the device until it is used again."""
        self.part.release()

    @torch.no_grad()
    def _posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        return self.model.encode(images.to(self.target.device, self.target.dtype)).latent_dist
