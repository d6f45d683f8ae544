"""Noise, targets and loss weights, each against its formula or against diffusers' own schedule."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from library.families.base import Batch
from library.families.sd import Sd
from library.options.groups import TrainNetworkOptions
from library.training.denoising import (
    Ddpm,
    denoising_loss,
    elementwise_loss,
    offset_noise,
    perturbed_noise,
    pyramid_noise,
    sample_noise,
)
from tests import tiny

CPU = torch.device("cpu")
TIMESTEPS = torch.tensor([0, 1, 20, 250, 500, 750, 998, 999])


def ddpm(v_prediction: bool = False, **options) -> Ddpm:
    return Ddpm(TrainNetworkOptions(**options), v_prediction, CPU)


def alphas_cumprod() -> np.ndarray:
    """[T] in double precision: betas linear in their square root."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    return np.cumprod(1 - betas)


def snr(timesteps: torch.Tensor = TIMESTEPS) -> np.ndarray:
    abar = alphas_cumprod()[timesteps.numpy()]
    return abar / (1 - abar)


def assert_near(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=5e-4, atol=1e-6)


@pytest.fixture(scope="module")
def diffusers_schedule():
    return DDPMScheduler(**tiny.SCHEDULE)


@pytest.fixture(scope="module")
def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMESTEPS), 4, 8, 8, generator=generator) for _ in range(2)]


# --- the schedule, against diffusers ---------------------------------------------------------------------------------


def test_noisy_latents_equal_diffusers(diffusers_schedule, latents_and_noise):
    latents, noise = latents_and_noise
    found = ddpm().add_noise(latents, noise, TIMESTEPS)
    assert torch.equal(found, diffusers_schedule.add_noise(latents, noise, TIMESTEPS))


def test_velocity_target_equals_diffusers(diffusers_schedule, latents_and_noise):
    latents, noise = latents_and_noise
    found = ddpm(v_prediction=True).target(latents, noise, TIMESTEPS)
    assert torch.equal(found, diffusers_schedule.get_velocity(latents, noise, TIMESTEPS))


def test_epsilon_target_is_the_noise(latents_and_noise):
    latents, noise = latents_and_noise
    assert torch.equal(ddpm().target(latents, noise, TIMESTEPS), noise)


def test_snr_is_that_of_the_schedule():
    assert_near(ddpm().snr, snr(torch.arange(1000)))


def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before():
    fixed, plain = ddpm(zero_terminal_snr=True), ddpm()
    assert (fixed.signal[-1], fixed.sigma[-1]) == (0, 1)
    torch.testing.assert_close(fixed.signal[0], plain.signal[0])
    assert (fixed.signal[1:-1] < plain.signal[1:-1]).all()
    assert (fixed.signal.diff() < 0).all()


def test_zero_terminal_snr_equals_diffusers(diffusers_schedule):
    wanted = (1 - rescale_zero_terminal_snr(diffusers_schedule.betas)).cumprod(dim=0)
    torch.testing.assert_close(ddpm(zero_terminal_snr=True).signal.square(), wanted, rtol=1e-4, atol=1e-6)


def test_loss_weights_are_of_the_schedule_before_zero_terminal_snr():
    options = {"v_prediction": True, "min_snr_gamma": 5.0}
    assert torch.equal(
        ddpm(zero_terminal_snr=True, **options).loss_weights(TIMESTEPS), ddpm(**options).loss_weights(TIMESTEPS)
    )


# --- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({}, 0, 999),
        ({"min_timestep": 990}, 990, 999),
        ({"max_timestep": 10}, 0, 9),
        ({"min_timestep": 200, "max_timestep": 203}, 200, 202),
    ],
)
def test_timesteps_are_drawn_evenly_from_min_up_to_but_not_max(options, first, last):
    torch.manual_seed(0)
    drawn = ddpm(**options).sample_timesteps(20_000)
    counts = torch.bincount(drawn - first, minlength=last - first + 1)
    assert (drawn.min(), drawn.max()) == (first, last)
    assert drawn.dtype == torch.int64
    assert counts.min() > 0 and counts.float().std() < 3 * counts.float().mean().sqrt()


@pytest.mark.parametrize(
    ("low", "high", "constant"), [(500, 500, 500), (700, 300, 300), (1000, 1000, 999), (1000, None, 999)]
)
def test_range_without_room_is_its_upper_end(low, high, constant):
    drawn = ddpm(min_timestep=low, max_timestep=high).sample_timesteps(5)
    assert drawn.tolist() == [constant] * 5


# --- weights of the loss ---------------------------------------------------------------------------------------------


def capped(snr_value: np.ndarray) -> np.ndarray:
    return np.minimum(snr_value, 1000)


WEIGHTS = {
    "none": (False, {}, lambda s: np.ones_like(s)),
    "min_snr": (False, {"min_snr_gamma": 5.0}, lambda s: np.minimum(s, 5) / s),
    "min_snr v": (True, {"min_snr_gamma": 5.0}, lambda s: np.minimum(s, 5) / (s + 1)),
    "min_snr of another gamma": (False, {"min_snr_gamma": 1.0}, lambda s: np.minimum(s, 1) / s),
    "scale_v_pred": (True, {"scale_v_pred_loss_like_noise_pred": True}, lambda s: capped(s) / (capped(s) + 1)),
    "v_pred_like": (False, {"v_pred_like_loss": 0.3}, lambda s: 1 + 0.3 / (capped(s) / (capped(s) + 1))),
    "debiased": (False, {"debiased_estimation_loss": True}, lambda s: 1 / np.sqrt(capped(s))),
    "debiased v": (True, {"debiased_estimation_loss": True}, lambda s: 1 / (capped(s) + 1)),
    "min_snr, v_pred_like and debiased": (
        False,
        {"min_snr_gamma": 5.0, "v_pred_like_loss": 0.3, "debiased_estimation_loss": True},
        lambda s: np.minimum(s, 5) / s * (1 + 0.3 * (capped(s) + 1) / capped(s)) / np.sqrt(capped(s)),
    ),
    "min_snr and scale_v_pred": (
        True,
        {"min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True},
        lambda s: np.minimum(s, 5) / (s + 1) * capped(s) / (capped(s) + 1),
    ),
    "zeros are off": (False, {"min_snr_gamma": 0.0, "v_pred_like_loss": 0.0}, lambda s: np.ones_like(s)),
}


@pytest.mark.parametrize("row", WEIGHTS.values(), ids=WEIGHTS)
def test_loss_weight_is_its_formula(row):
    v_prediction, options, formula = row
    weights = ddpm(v_prediction, **options).loss_weights(TIMESTEPS)
    assert weights.shape == TIMESTEPS.shape
    assert_near(weights, formula(snr()))


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_latents():
    """Latents whose channels have the means 0, 1, -2 and 0."""
    torch.manual_seed(0)
    means = torch.tensor([0.0, 1.0, -2.0, 0.0]).view(1, 4, 1, 1)
    noise = torch.randn(1000, 4, 4, 4)
    return noise - noise.mean(dim=(2, 3), keepdim=True) + means


def test_plain_noise_is_standard_normal_and_seeded(many_latents):
    torch.manual_seed(1)
    noise = sample_noise(many_latents, TrainNetworkOptions())
    torch.manual_seed(1)
    assert torch.equal(noise, torch.randn_like(many_latents))


def test_noise_offset_moves_channel_means_with_its_variance(many_latents):
    noise = sample_noise(many_latents, TrainNetworkOptions(noise_offset=0.5))
    means = noise.mean(dim=(2, 3))  # of 16 cells: variance 1/16 of their own and 0.5 squared of the offset
    assert means.var().item() == pytest.approx(1 / 16 + 0.25, rel=0.1)
    assert means.mean().item() == pytest.approx(0, abs=0.05)
    within = (noise - means[:, :, None, None]).var().item()
    assert within == pytest.approx(15 / 16, rel=0.05)
    assert np.corrcoef(means.T)[np.triu_indices(4, 1)] == pytest.approx(0, abs=0.15)


def test_noise_offset_is_one_number_for_a_channel(many_latents):
    offset = offset_noise(many_latents, TrainNetworkOptions(noise_offset=0.5))
    assert offset.shape == (1000, 4, 1, 1)


def test_random_strength_is_drawn_once_a_batch_between_0_and_the_offset(many_latents):
    options = TrainNetworkOptions(noise_offset=0.5, noise_offset_random_strength=True)
    strengths = [offset_noise(many_latents, options).std().item() for _ in range(200)]
    assert 0 <= min(strengths) < 0.05 and 0.45 < max(strengths) < 0.53
    assert np.mean(strengths) == pytest.approx(0.25, abs=0.04)


def test_adaptive_scale_adds_the_channels_mean_to_the_offset(many_latents):
    offset = offset_noise(many_latents, TrainNetworkOptions(noise_offset=0.5, adaptive_noise_scale=0.25))
    wanted = [0.5, 0.5 + 0.25 * 1, 0.5 + 0.25 * 2, 0.5]
    np.testing.assert_allclose(offset.std(dim=0).flatten(), wanted, rtol=0.1)


def test_adaptive_scale_below_zero_ends_at_no_offset(many_latents):
    offset = offset_noise(many_latents, TrainNetworkOptions(noise_offset=0.5, adaptive_noise_scale=-0.3))
    assert not offset[:, 2].any()  # 0.5 - 0.3 * 2 is below 0
    np.testing.assert_allclose(offset.std(dim=0).flatten()[:2], [0.5, 0.2], rtol=0.1)


def neighbours_correlation(noise: torch.Tensor) -> float:
    return np.corrcoef(noise[..., :-1].flatten(), noise[..., 1:].flatten())[0, 1]


def test_pyramid_noise_has_unit_variance_and_like_neighbours():
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 16, 16)
    pyramid = pyramid_noise(noise, 6, 0.8)
    assert pyramid.shape == noise.shape
    assert pyramid.std().item() == pytest.approx(1, abs=1e-4)
    assert abs(neighbours_correlation(noise)) < 0.015
    assert neighbours_correlation(pyramid_noise(noise, 6, 0.3)) > 0.02
    assert neighbours_correlation(pyramid) > neighbours_correlation(pyramid_noise(noise, 6, 0.3)) + 0.1


def test_first_level_of_the_pyramid_is_full_resolution_noise_of_weight_1():
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 16, 16)
    pyramid = pyramid_noise(noise, 1, 0.3)
    assert np.corrcoef(noise.flatten(), pyramid.flatten())[0, 1] == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert abs(neighbours_correlation(pyramid)) < 0.03


def test_second_level_of_the_pyramid_is_weighted_by_the_discount():
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 16, 16)
    pyramid = pyramid_noise(noise, 2, 1e-4)
    assert np.corrcoef(noise.flatten(), pyramid.flatten())[0, 1] == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert abs(neighbours_correlation(pyramid)) < 0.03


def test_noise_of_one_cell_takes_any_number_of_levels():
    assert pyramid_noise(torch.randn(8, 4, 1, 3), 10, 0.3).isfinite().all()


def test_multires_noise_follows_the_offset(many_latents):
    options = TrainNetworkOptions(noise_offset=2.0, multires_noise_iterations=4)
    noise = sample_noise(many_latents, options)
    assert noise.std().item() == pytest.approx(1, abs=1e-4)
    assert noise.mean(dim=(2, 3)).var() > 0.5


def test_input_perturbation_adds_noise_of_its_strength(many_latents):
    noise = torch.randn_like(many_latents)
    added = perturbed_noise(noise, TrainNetworkOptions(ip_noise_gamma=0.1)) - noise
    assert added.std().item() == pytest.approx(0.1, rel=0.03)
    assert perturbed_noise(noise, TrainNetworkOptions()) is noise


def test_random_perturbation_is_drawn_once_a_batch_between_0_and_its_strength():
    noise = torch.zeros(50, 4, 4, 4)
    options = TrainNetworkOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True)
    torch.manual_seed(0)
    strengths = [perturbed_noise(noise, options).std().item() for _ in range(200)]
    assert 0 <= min(strengths) < 0.01 and 0.09 < max(strengths) < 0.107
    assert np.mean(strengths) == pytest.approx(0.05, abs=0.008)


# --- how prediction and target are compared --------------------------------------------------------------------------

LOSSES = {
    "l2": lambda d, c: d**2,
    "l1": lambda d, c: np.abs(d),
    "huber": lambda d, c: 2 * c * (np.sqrt(d**2 + c**2) - c),
    "smooth_l1": lambda d, c: 2 * (np.sqrt(d**2 + c**2) - c),
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_elementwise_loss_is_its_formula(loss_type, latents_and_noise):
    prediction, target = latents_and_noise
    huber_c = torch.linspace(0.05, 2, len(TIMESTEPS))
    difference = (prediction - target).numpy().astype(np.float64)
    wanted = LOSSES[loss_type](difference, huber_c.numpy().reshape(-1, 1, 1, 1))
    assert_near(elementwise_loss(prediction, target, huber_c, loss_type), wanted)


HUBER_SCHEDULES = {
    "constant": lambda t, sigma: np.full(len(t), 0.2 * 1.5),
    "exponential": lambda t, sigma: np.exp(np.log(0.2) / 1000 * t) * 1.5,
    "snr": lambda t, sigma: (1 - 0.2) / (1 + sigma) ** 2 + 0.2,  # without huber_scale
}


@pytest.mark.parametrize("schedule", HUBER_SCHEDULES)
def test_width_of_the_huber_loss_follows_its_schedule(schedule):
    objective = ddpm(loss_type="huber", huber_schedule=schedule, huber_c=0.2, huber_scale=1.5)
    assert_near(objective.huber_c(TIMESTEPS), HUBER_SCHEDULES[schedule](TIMESTEPS.numpy(), snr() ** -0.5))


def test_width_by_snr_is_of_the_schedule_that_is_trained():
    objective = ddpm(loss_type="huber", huber_schedule="snr", zero_terminal_snr=True)
    found = objective.huber_c(TIMESTEPS)
    assert found[-1].item() == pytest.approx(0.1)  # pure noise: sigma is without bound
    sigma = (objective.sigma / objective.signal)[TIMESTEPS[:-1]].numpy()
    assert_near(found[:-1], 0.9 / (1 + sigma) ** 2 + 0.1)


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tiny_folder):
    options = TrainNetworkOptions(pretrained_model_name_or_path=str(tiny_folder))
    return Sd(options, CPU, torch.float32)


def batch(**changes) -> Batch:
    generator = torch.Generator().manual_seed(5)
    values = dict(
        captions=["a cat", "a dog"],
        loss_weights=torch.ones(2),
        images=None,
        latents=5 * torch.randn(2, 4, 8, 8, generator=generator),
        conds=None,
        alpha_masks=None,
        original_sizes_hw=torch.full((2, 2), 64),
        crop_top_lefts=torch.zeros(2, 2, dtype=torch.int64),
        target_sizes_hw=torch.full((2, 2), 64),
    )
    return Batch(**values | changes)


@torch.no_grad()
def loss_and_passage(family, objective, one_batch, timesteps):
    """The loss, the noise that was drawn first, and what went into and came out of the U-Net."""
    seen = {}

    def look(_, arguments, output):
        seen["noisy"], seen["timesteps"], seen["hidden"] = arguments
        seen["prediction"] = output[0]

    handle = family.unet.register_forward_hook(look)
    torch.manual_seed(7)
    loss = denoising_loss(family, objective, one_batch, timesteps)
    handle.remove()
    torch.manual_seed(7)
    return loss, torch.randn_like(one_batch.latents), seen


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_is_the_weighted_mean_of_each_sample(loss_type, v_prediction, family):
    timesteps = torch.tensor([40, 700])
    objective = ddpm(v_prediction, loss_type=loss_type, min_snr_gamma=5.0)
    loss, noise, seen = loss_and_passage(family, objective, batch(), timesteps)
    abar = alphas_cumprod()[timesteps.numpy()].reshape(-1, 1, 1, 1)
    latents, noise = 0.18215 * batch().latents.numpy(), noise.numpy()
    noisy = np.sqrt(abar) * latents + np.sqrt(1 - abar) * noise
    np.testing.assert_allclose(seen["noisy"], noisy, rtol=1e-4, atol=1e-5)
    target = np.sqrt(abar) * noise - np.sqrt(1 - abar) * latents if v_prediction else noise
    ratio = (abar / (1 - abar)).flatten()
    huber_c = 0.9 / (1 + ratio.reshape(-1, 1, 1, 1) ** -0.5) ** 2 + 0.1
    error = LOSSES[loss_type](seen["prediction"].numpy() - target, huber_c).mean(axis=(1, 2, 3))
    weight = np.minimum(ratio, 5) / (ratio + 1 if v_prediction else ratio)
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss, error * weight, rtol=1e-3)


def test_weights_of_the_batch_multiply_their_samples_only(family):
    timesteps = torch.tensor([40, 700])
    plain, _, _ = loss_and_passage(family, ddpm(), batch(), timesteps)
    weighted, _, _ = loss_and_passage(family, ddpm(), batch(loss_weights=torch.tensor([1.0, 0.25])), timesteps)
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.25]))


def test_input_perturbation_changes_the_input_and_not_the_target(family):
    timesteps = torch.tensor([40, 700])
    _, noise, plain = loss_and_passage(family, ddpm(), batch(), timesteps)
    loss, _, perturbed = loss_and_passage(family, ddpm(ip_noise_gamma=0.5), batch(), timesteps)
    moved = (perturbed["noisy"] - plain["noisy"]).std(dim=(1, 2, 3))
    np.testing.assert_allclose(moved, 0.5 * np.sqrt(1 - alphas_cumprod()[timesteps.numpy()]), rtol=0.15)
    torch.testing.assert_close(loss, (perturbed["prediction"] - noise).square().mean(dim=(1, 2, 3)))


def test_noise_offset_is_part_of_the_target(family):
    timesteps = torch.tensor([999, 999])
    objective = ddpm(noise_offset=3.0, zero_terminal_snr=True)
    loss, _, seen = loss_and_passage(family, objective, batch(), timesteps)  # the input is the noise itself
    torch.testing.assert_close(loss, (seen["prediction"] - seen["noisy"]).square().mean(dim=(1, 2, 3)))


def test_every_sample_is_seen_at_its_timestep_with_its_caption(family):
    _, _, seen = loss_and_passage(family, ddpm(), batch(), torch.tensor([40, 700]))
    assert seen["timesteps"].tolist() == [40, 700]
    with torch.no_grad():
        wanted = torch.cat([family.encode_text([caption]) for caption in ("a cat", "a dog")])
    torch.testing.assert_close(seen["hidden"], wanted)


def test_pictures_and_their_latents_give_the_same_loss(family):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with_images, with_latents, timesteps = batch(images=images, latents=None), batch(), torch.tensor([40, 700])
    with torch.no_grad():
        torch.manual_seed(7)
        from_images = denoising_loss(family, ddpm(), with_images, timesteps)
        torch.manual_seed(7)
        with_latents.latents = family.vae.encode(images)
        assert torch.equal(denoising_loss(family, ddpm(), with_latents, timesteps), from_images)


def test_timesteps_are_drawn_within_the_range_where_none_are_given(family):
    _, _, seen = loss_and_passage(family, ddpm(min_timestep=300, max_timestep=302), batch(), None)
    assert set(seen["timesteps"].tolist()) <= {300, 301}


def test_only_the_weights_that_train_get_gradients(family):
    loss = denoising_loss(family, ddpm(), batch(), torch.tensor([40, 700]))
    assert not loss.requires_grad
    family.unet.conv_in.requires_grad_(True)
    denoising_loss(family, ddpm(), batch(), torch.tensor([40, 700])).mean().backward()
    family.unet.conv_in.requires_grad_(False)
    assert family.unet.conv_in.weight.grad.any()
    family.unet.conv_in.zero_grad(set_to_none=True)
