"""What training asks of Stable Diffusion 1.x and 2.x: conditioning with weights in captions and prompts, metadata."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.families.base import Batch
from library.families.sd import Sd
from library.options.groups import TrainNetworkOptions

CAPTIONS = ["a (cat:1.5) and [a dog]", "a (cat:1.5) and [a dog] " + " ".join(["mouse"] * 80), "a cat"]


@pytest.fixture(params=["sd1", "sd2"])
def model(request, tiny_file, tiny_sd2_file) -> Path:
    return {"sd1": tiny_file, "sd2": tiny_sd2_file}[request.param]


def family_of(path: Path, **options: object) -> Sd:
    """The family on the CPU, its text encoder's output with a mean that is not 0, as those of trained ones."""
    given = TrainNetworkOptions(pretrained_model_name_or_path=str(path), **options)
    family = Sd(given, torch.device("cpu"), torch.float32)
    family.text_encoder.final_layer_norm.bias.fill_(0.5)
    return family


def batch(captions: list[str]) -> Batch:
    sizes = torch.zeros(len(captions), 2, dtype=torch.int64)
    return Batch(captions, torch.ones(len(captions)), None, None, None, None, sizes, sizes, sizes)


@torch.no_grad()
def conds(family: Sd, captions: list[str]) -> Tensor:
    return family.conds(batch(captions))["hidden"]


@pytest.mark.parametrize("max_token_length", [None, 150])
def test_weighted_captions_multiply_the_hidden_states_of_their_words(model, max_token_length):
    plain = family_of(model, max_token_length=max_token_length)
    weighted = family_of(model, max_token_length=max_token_length, weighted_captions=True)
    text = CAPTIONS[0].translate(str.maketrans("", "", "()[]")).replace(":1.5", "")
    ratio = conds(weighted, [CAPTIONS[0]]) / conds(plain, [text])
    length = ratio.shape[1]
    wanted = torch.tensor([1.0, 1.0, 1.5, 1.0, 1 / 1.1, 1 / 1.1] + [1.0] * (length - 6))
    torch.testing.assert_close(ratio, wanted.view(1, -1, 1).expand_as(ratio))


def test_brackets_are_text_without_the_flag(model):
    assert not torch.allclose(conds(family_of(model), ["(cat:1.5)"]), conds(family_of(model), ["cat"]))


@pytest.mark.parametrize("weighted_captions", [True, False])
def test_remembered_captions_are_those_computed_anew(model, weighted_captions):
    frozen = family_of(model, weighted_captions=weighted_captions, max_token_length=150)
    first, again = conds(frozen, CAPTIONS), conds(frozen, CAPTIONS[::-1]).flip(0)
    trained = family_of(model, weighted_captions=weighted_captions, max_token_length=150)
    trained.trains_text_encoder = True
    assert torch.equal(first, again)
    torch.testing.assert_close(first, conds(trained, CAPTIONS))


@torch.no_grad()
def test_weights_in_prompts_always_count_and_keep_the_mean(model):
    family = family_of(model)
    weighted, negative = family.prompt_conds("a (cat:1.5)", "[dog]")["hidden"]
    plain, plain_negative = family.prompt_conds("a cat", "dog")["hidden"]
    for found, without, position, factor in ((weighted, plain, 2, 1.5), (negative, plain_negative, 1, 1 / 1.1)):
        torch.testing.assert_close(found.mean(), without.mean())
        strength = (found / without)[position] / (found / without)[0]
        torch.testing.assert_close(strength, torch.full_like(strength, factor))


@torch.no_grad()
def test_prompts_get_as_many_chunks_as_the_longer_one_needs_not_counting_brackets(model):
    words = " ".join(["cat"] * 75)
    lengths = [
        family_of(model).prompt_conds(f"({text}:1.2)", "")["hidden"].shape[1] for text in (words, f"{words} cat")
    ]
    assert lengths == [77, 152]


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
