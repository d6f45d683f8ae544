"""The denoising objective: noise, timesteps, targets, and the weight of each sample's loss.

Shapes: B batch, C latent channels, h w latent cells, T timesteps. SNR_t = abar_t / (1 - abar_t).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.families.base import Batch, Conds, ModelFamily
from library.options.groups import DenoisingOptions
from library.training.randomness import BatchRandomness

NUM_TIMESTEPS = 1000
TORCHS_OWN = BatchRandomness()
MAX_SNR = 1000.0  # the SNR of the first steps is without bound; weights stop here


class Ddpm:
    """The diffusion of Stable Diffusion: scaled-linear betas, epsilon or v targets (arXiv:2006.11239, 2202.00512)."""

    def __init__(self, options: DenoisingOptions, v_prediction: bool, device: torch.device):
        self.options = options
        self.v_prediction = v_prediction
        self.device = device
        alphas_cumprod = scaled_linear_alphas_cumprod()
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).to(device)  # [T], of the schedule before any change of it
        if options.zero_terminal_snr:
            alphas_cumprod = with_zero_terminal_snr(alphas_cumprod)
        self.signal = alphas_cumprod.sqrt().to(device)  # [T]
        self.sigma = (1 - alphas_cumprod).sqrt().to(device)  # [T]

    def sample_timesteps(self, count: int, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
        """[B] uniform in [min_timestep, max_timestep), drawn on the CPU so that every device draws the same."""
        low, high = self.options.min_timestep or 0, self.options.max_timestep or NUM_TIMESTEPS
        if low >= high:
            return torch.full((count,), min(high, NUM_TIMESTEPS - 1), device=self.device)
        drawn = torch.randint(low, high, (randomness.size(count),), generator=randomness.cpu_generator)
        return randomness.rows(drawn).to(self.device, non_blocking=True)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise (arXiv:2006.11239, Eq. 4)."""
        signal, sigma = self._per_sample(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv:2202.00512, section 4)."""
        if not self.v_prediction:
            return noise
        signal, sigma = self._per_sample(timesteps)
        return signal * noise - sigma * latents

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """[B]: the product of the weightings that are on."""
        options, snr = self.options, self.snr[timesteps]
        bounded = snr.clamp(max=MAX_SNR)
        weights = torch.ones_like(snr)
        if options.min_snr_gamma:  # arXiv:2303.09556
            weights = weights * snr.clamp(max=options.min_snr_gamma) / (snr + 1 if self.v_prediction else snr)
        if options.scale_v_pred_loss_like_noise_pred:
            weights = weights * bounded / (bounded + 1)
        if options.v_pred_like_loss:
            weights = weights * (1 + options.v_pred_like_loss * (bounded + 1) / bounded)
        if options.debiased_estimation_loss:  # arXiv:2310.08442
            weights = weights * (1 / (bounded + 1) if self.v_prediction else bounded.rsqrt())
        return weights

    def _per_sample(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.signal[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)

    def huber_c(self, timesteps: Tensor) -> Tensor:
        """[B] the point where the Huber losses turn from square to linear, by `huber_schedule`."""
        options = self.options
        if options.huber_schedule == "exponential":
            decay = -math.log(options.huber_c) / NUM_TIMESTEPS
            return torch.exp(-decay * timesteps) * options.huber_scale
        if options.huber_schedule == "snr":
            sigma = self.sigma[timesteps] / self.signal[timesteps]  # of the schedule that is trained
            return (1 - options.huber_c) / (1 + sigma) ** 2 + options.huber_c
        return torch.full(timesteps.shape, options.huber_c * options.huber_scale, device=timesteps.device)


def scaled_linear_alphas_cumprod() -> Tensor:
    """[T] of Stable Diffusion: betas linear in their square root, 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS) ** 2
    return (1 - betas).cumprod(dim=0)


def with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that the last is 0 and the first stays (arXiv:2305.08891, algorithm 1)."""
    signal = alphas_cumprod.sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    return ((signal - last) * first / (first - last)) ** 2


def sample_noise(latents: Tensor, options: DenoisingOptions, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
    """Noise [B, C, h, w] with the offset and the pyramid of resolutions that are on; all of it is the target."""
    noise = randomness.normal_for_all(latents)  # [N, C, h, w], N rows of the global batch
    if options.noise_offset:
        noise = noise + offset_noise(latents, options, randomness)
    if options.multires_noise_iterations:
        levels = options.multires_noise_iterations, options.multires_noise_discount
        noise = pyramid_noise(noise, *levels, randomness)
    return randomness.rows(noise)


def offset_noise(latents: Tensor, options: DenoisingOptions, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
    """One number per sample of the global batch and channel [N, C, 1, 1], `noise_offset` strong."""
    noise = randomness.normal_for_all(latents[:, :, :1, :1])
    strength = torch.full_like(noise, options.noise_offset)
    if options.noise_offset_random_strength:
        strength = strength * randomness.uniform(latents.device)
    if options.adaptive_noise_scale:
        mean = randomness.of_all(latents.mean(dim=(2, 3), keepdim=True)).abs()
        strength = (strength + options.adaptive_noise_scale * mean).clamp(min=0)
    return strength * noise


def pyramid_noise(noise: Tensor, iterations: int, discount: float, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
    """Noise of the global batch plus coarser noises, each `discount` times weaker, scaled back to unit variance."""
    height, width = noise.shape[-2:]
    for level in range(iterations):
        ratio = 2 + 2 * torch.rand(1, generator=randomness.cpu_generator).item()  # no wait for the device
        size = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        shape = *noise.shape[:2], *size
        coarse = torch.randn(shape, generator=randomness.generator, device=noise.device, dtype=noise.dtype)
        noise = noise + F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def perturbed_noise(noise: Tensor, options: DenoisingOptions, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
    """The noise that goes into the input while the target stays: input perturbation (arXiv:2301.11706, Eq. 7)."""
    if not options.ip_noise_gamma:
        return noise
    gamma = options.ip_noise_gamma
    if options.ip_noise_gamma_random_strength:
        gamma = gamma * randomness.uniform(noise.device)
    return noise + gamma * randomness.normal_like(noise)


def elementwise_loss(prediction: Tensor, target: Tensor, huber_c: Tensor | None, loss_type: str) -> Tensor:
    """[B, C, h, w], unreduced; `huber_c` [B] is for the Huber losses only."""
    if loss_type == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    if loss_type == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    c = huber_c.view(-1, 1, 1, 1)
    pseudo = 2 * (torch.sqrt((prediction - target) ** 2 + c**2) - c)
    return c * pseudo if loss_type == "huber" else pseudo


def scaled_latents(family: ModelFamily, batch: Batch, randomness: BatchRandomness = TORCHS_OWN) -> Tensor:
    """[B, C, h, w] as the U-Net sees them, encoded now where they are not cached."""
    latents = batch.latents
    if latents is None:
        latents = family.vae.encode(batch.images, randomness.normal_like)
    return latents * family.vae.scale


def resized_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """[B, 1, h, w] fp32: the mean of the mask [B, H, W] over each latent cell."""
    return F.interpolate(masks.float().unsqueeze(1), size=latents.shape[-2:], mode="area")


@dataclass(frozen=True)
class Question:
    """What a model is asked about a batch, and how its answer is judged; all on the device."""

    noisy: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    conds: Conds
    target: Tensor  # [B, C, h, w]
    weights: Tensor  # [B]
    huber_c: Tensor | None  # [B], for the Huber losses
    masks: Tensor | None  # [B, 1, h, w]


def question_of(
    family: ModelFamily,
    objective: Ddpm,
    batch: Batch,
    timesteps: Tensor | None = None,
    network_off: Callable[[], AbstractContextManager] = nullcontext,
    randomness: BatchRandomness = TORCHS_OWN,
) -> Question:
    """Draw noise and timesteps (where none are given) for a batch.

    `network_off` switches the network off while rows are predicted whose output is to be preserved.
    """
    options = objective.options
    latents = scaled_latents(family, batch, randomness)
    conds = family.conds(batch)
    noise = sample_noise(latents, options, randomness)
    if timesteps is None:
        timesteps = objective.sample_timesteps(len(latents), randomness)
    noisy = objective.add_noise(latents, perturbed_noise(noise, options, randomness), timesteps)
    target = objective.target(latents, noise, timesteps)
    if rows := batch.preserved_rows:
        index = torch.tensor(rows).to(target.device, non_blocking=True)
        here = {name: value.index_select(0, index) for name, value in conds.items()}
        with torch.no_grad(), network_off():
            preserved = family.predict(noisy.index_select(0, index), timesteps.index_select(0, index), here)
        target = target.index_copy(0, index, preserved.to(target.dtype))
    return Question(
        noisy,
        timesteps,
        conds,
        target,
        batch.loss_weights * objective.loss_weights(timesteps),
        objective.huber_c(timesteps) if options.loss_type in ("huber", "smooth_l1") else None,
        None if batch.alpha_masks is None else resized_masks(batch.alpha_masks, target),
    )


def losses_of(family: ModelFamily, question: Question, loss_type: str) -> Tensor:
    """The weighted loss of each sample, [B]; the caller takes the mean."""
    prediction = family.predict(question.noisy, question.timesteps, question.conds)
    loss = elementwise_loss(prediction.float(), question.target.float(), question.huber_c, loss_type)  # [B, C, h, w]
    if question.masks is not None:
        loss = loss * question.masks
    return loss.mean(dim=(1, 2, 3)) * question.weights


def denoising_loss(
    family: ModelFamily, objective: Ddpm, batch: Batch, timesteps: Tensor | None = None, **how: Any
) -> Tensor:
    """Ask and judge at once; `how` as for `question_of`."""
    return losses_of(family, question_of(family, objective, batch, timesteps, **how), objective.options.loss_type)
