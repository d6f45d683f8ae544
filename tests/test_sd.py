"""What training asks of Stable Diffusion 1.x and 2.x: metadata, tokens."""

from pathlib import Path

import pytest
import torch

from library.families.sd import Sd
from library.options.groups import TrainNetworkOptions


@pytest.fixture(params=["sd1", "sd2"])
def model(request, tiny_file, tiny_sd2_file) -> Path:
    return {"sd1": tiny_file, "sd2": tiny_sd2_file}[request.param]


def family_of(path: Path, **options: object) -> Sd:
    given = TrainNetworkOptions(pretrained_model_name_or_path=str(path), **options)
    return Sd(given, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("v_parameterization", [True, False])
def test_metadata_is_of_the_model_that_was_loaded_whatever_v2_says(model, v_parameterization, tiny_sd2_file):
    is_v2 = model == tiny_sd2_file
    metadata = family_of(model, v2=not is_v2, v_parameterization=v_parameterization).metadata()
    wanted = {
        (False, False): ("False", "sd_v1", "stable-diffusion-v1", "512x512"),
        (False, True): ("False", "sd_v1_v", "stable-diffusion-v1", "512x512"),
        (True, False): ("True", "sd_v2", "stable-diffusion-v2-512", "512x512"),
        (True, True): ("True", "sd_v2_v", "stable-diffusion-v2-768-v", "768x768"),
    }[is_v2, v_parameterization]
    names = ("ss_v2", "ss_base_model_version", "modelspec.architecture", "modelspec.resolution")
    assert tuple(metadata[name] for name in names) == wanted


def test_tokens_are_padded_as_each_version_was_trained(model, tiny_sd2_file):
    assert family_of(model).tokenizer.pad_token_id == (0 if model == tiny_sd2_file else 49407)
