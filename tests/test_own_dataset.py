"""--dataset_class: batches from a class of the user's own."""

import sys
from pathlib import Path

import pytest

from library.errors import UserError
from tests import tiny
from tests.results import metadata_of, weights_equal
from train_network import train

SOURCE = """
import random

import torch


class Pairs(torch.utils.data.Dataset):
    batch_size = num_train_images = 2
    epochs = []

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        assert (tokenizer, max_token_length, resolution, debug_dataset) == (None, 150, "64,64", False)

    def __len__(self):
        return 5

    def set_current_epoch(self, epoch):
        Pairs.epochs.append(epoch)

    def __getitem__(self, index):
        captions = [f"a cat, number {index}", random.choice(["a dog", "two dogs"])]
        return {"images": torch.rand(2, 3, 64, 64) * 2 - 1, "captions": captions, "loss_weights": [1, 0.5]}


class Latents(Pairs):
    def __getitem__(self, index):
        return {"latents": torch.full((1, 4, 8, 8), float(index)), "captions": ["a cat"], "images": None}


class Empty(Pairs):
    def __len__(self):
        return 0


class Uneven(Pairs):
    def __getitem__(self, index):
        return {"images": torch.rand(2, 3, 64, 64), "captions": ["one"]}


class Bare(Pairs):
    def __getitem__(self, index):
        return torch.rand(2, 3, 64, 64)
"""


@pytest.fixture
def words(tmp_path, monkeypatch, tiny_file):
    """A command line for a class of a module in the working folder."""
    (tmp_path / "my_pictures.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda name, output, **more: tiny.arguments(
        tiny_file, None, Path(output), dataset_class=name, resolution="64,64", max_token_length=150,
        cache_latents=False, enable_bucket=False, min_bucket_reso=None, max_bucket_reso=None, caption_extension=None,
        **more,
    )  # fmt: skip
    sys.modules.pop("my_pictures", None)


@pytest.mark.parametrize("name", ["my_pictures.Pairs", "my_pictures.Latents"])
def test_a_class_trains_and_resumes_to_the_same_bits(name, words, tmp_path):
    train(words(name, "whole", max_train_epochs=2, save_state=True, save_every_n_epochs=1))
    state = tmp_path / "whole" / "lora-000001-state"
    train(words(name, "rest", max_train_epochs=2, resume=state))
    whole, rest = tmp_path / "whole" / "lora.safetensors", tmp_path / "rest" / "lora.safetensors"
    assert weights_equal(whole, rest)
    metadata = metadata_of(whole)
    assert metadata["ss_steps"] == "10" and metadata["ss_num_train_images"] == "2"
    assert set(sys.modules["my_pictures"].Pairs.epochs) == {1, 2}


def test_workers_give_the_same_batches(words, tmp_path):
    train(words("my_pictures.Pairs", "a"))
    train(words("my_pictures.Pairs", "b", max_data_loader_n_workers=2))
    assert weights_equal(tmp_path / "a" / "lora.safetensors", tmp_path / "b" / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("Pairs", {}, "must be MODULE.CLASS"),
        ("my_pictures.Pears", {}, "cannot be used .AttributeError: .*Pears"),
        ("no_pictures.Pairs", {}, "cannot be used .ModuleNotFoundError: .*no_pictures"),
        ("my_pictures.Empty", {}, "has no batches"),
        ("my_pictures.Uneven", {}, r"item \d has 2 pictures and 1 captions"),
        ("my_pictures.Bare", {}, r"item \d must be a dict with captions and images"),
        ("my_pictures.Pairs", {"debug_dataset": True}, "--debug_dataset does not go with --dataset_class"),
    ],
)
def test_what_is_wrong_with_a_class_is_a_sentence(name, more, sentence, words):
    with pytest.raises(UserError, match=sentence):
        train(words(name, "out", **more))


def test_flags_of_other_datasets_have_no_effect_and_a_line_says_so(words, capsys):
    train(words("my_pictures.Latents", "out", shuffle_caption=True))
    assert "--shuffle_caption has no effect beside --dataset_class" in capsys.readouterr().err
