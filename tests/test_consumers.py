"""What is written is what other programs read: diffusers takes the file and draws what training's own model draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from library.families import family_class, family_of_kind
from library.families.base import ModelFamily
from library.families.detect import inspect_checkpoint
from library.options.groups import TrainNetworkOptions
from library.recipes.network_building import build_network
from library.training.prompts import SamplePrompt
from library.training.sampling import SAMPLERS, SCHEDULE, draw
from networks import lora
from tests import tiny
from train_network import train

PROMPT = SamplePrompt("a cat, number 1", negative_prompt="dog", width=64, height=64, sample_steps=4, scale=5.0, seed=3)
TOLERANCE = 3  # of 255, for the largest difference of a pixel
FLAGS = {"sd1": {}, "sd2": {"v2": True, "v_parameterization": True}, "sdxl": {}}  # by kind of checkpoint


@pytest.fixture(params=FLAGS)
def model(request, tiny_file, tiny_sd2_file, tiny_sdxl_file) -> tuple[str, Path]:
    """A toy model's kind and file."""
    return request.param, {"sd1": tiny_file, "sd2": tiny_sd2_file, "sdxl": tiny_sdxl_file}[request.param]


def loaded(kind: str, path: Path, **more: object) -> ModelFamily:
    options = TrainNetworkOptions(pretrained_model_name_or_path=str(path), **FLAGS[kind], **more)
    family = family_class(family_of_kind(inspect_checkpoint(str(path))))
    return family(options, torch.device("cpu"), torch.float32)


def trained(tmp_path: Path, model: tuple[str, Path], pictures: Path, **more: object) -> tuple[ModelFamily, Path]:
    """The family as it is in training, with the trained network on it, and the network's file."""
    kind, checkpoint = model
    arguments = dict(learning_rate=0.02, network_args=["conv_dim=4", "conv_alpha=2"], network_alpha=2) | more
    train(tiny.arguments(checkpoint, pictures, tmp_path / "out", **FLAGS[kind], **arguments))
    path = tmp_path / "out" / "lora.safetensors"
    family = loaded(kind, checkpoint, network_dim=4, network_weights=str(path))
    build_network(lora, family, family.options, {"conv_dim": "4"}).eval()
    return family, path


def diffusers_pipeline(family: ModelFamily, kind: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    prediction_type = "v_prediction" if family.v_prediction else "epsilon"
    scheduler = DDIMScheduler(**SCHEDULE, **SAMPLERS["ddim"][1], prediction_type=prediction_type)
    unet, vae, text_encoders = tiny.models(kind)
    if kind == "sdxl":
        pipeline = StableDiffusionXLPipeline(vae, *text_encoders, *family.tokenizers, unet, scheduler)
    else:
        pipeline = StableDiffusionPipeline(
            vae, *text_encoders, family.tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: StableDiffusionPipeline, prompt: SamplePrompt) -> np.ndarray:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(prompt.seed))
    picture = pipeline(
        prompt.prompt, negative_prompt=prompt.negative_prompt, width=64, height=64, latents=noise,
        num_inference_steps=prompt.sample_steps, guidance_scale=prompt.scale,
    ).images[0]  # fmt: skip
    return np.asarray(picture, dtype=int)


@pytest.fixture
def restored_models():
    """diffusers' loader puts adapters into the shared toy models; take them out again."""
    yield
    tiny.forget_models()


def test_diffusers_draws_the_same_pictures_with_the_file(model, pictures, tmp_path, restored_models):
    family, path = trained(tmp_path, model, pictures)
    pipeline = diffusers_pipeline(family, model[0])
    without = drawn_by(pipeline, PROMPT)
    pipeline.load_lora_weights(str(path))
    theirs, ours = drawn_by(pipeline, PROMPT), np.asarray(draw(family, PROMPT, "ddim"), dtype=int)
    assert abs(theirs - without).max() > 10 * TOLERANCE, "the network must be seen in the picture"
    assert abs(theirs - ours).max() <= TOLERANCE


def test_our_pictures_equal_diffusers_without_a_network(model, restored_models):
    family = loaded(*model)
    ours = np.asarray(draw(family, PROMPT, "ddim"), dtype=int)
    assert abs(ours - drawn_by(diffusers_pipeline(family, model[0]), PROMPT)).max() <= 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws(name, model):
    picture = draw(loaded(*model), replace(PROMPT, sample_sampler=name, sample_steps=3), "ddim")
    assert picture.size == (64, 64) and np.asarray(picture).std() > 1
