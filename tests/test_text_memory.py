"""A frozen text encoder reads every caption once, and is out of the way when it has read all of them."""

import random

import pytest
import torch
from accelerate import Accelerator

from library.dataset.captions import possible_captions, process_caption
from library.dataset.config import SubsetOptions
from library.dataset.dataset import TrainingDataset
from library.dataset.scan import scan_dataset
from library.families import text_memory
from library.families.base import ModelFamily
from library.families.text_memory import TextMemory
from library.options.groups import TrainNetworkOptions
from library.training.caching import cache_text
from tests import tiny
from tests.results import scalars, weights_equal
from tests.test_sd import batch
from train_network import train

CPU = torch.device("cpu")


def encoding_counted(captions: list[str]):
    """An encoder that notes what it has read."""

    def encode(caption: str) -> dict[str, torch.Tensor]:
        captions.append(caption)
        return {"hidden": torch.full((2, 3), float(len(caption))), "pooled": torch.full((3,), -float(len(caption)))}

    return encode


@pytest.fixture
def cached(model_file, pictures):
    """A dataset and a family that has read its captions beforehand, where that is possible."""

    def make(device: torch.device = CPU, **changes: object) -> tuple[TrainingDataset, ModelFamily]:
        options = TrainNetworkOptions(
            pretrained_model_name_or_path=str(model_file), train_data_dir=str(pictures), resolution="96,96",
            caption_extension=".txt", enable_bucket=False, **changes,
        )  # fmt: skip
        dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)
        family = tiny.load_family(options, device)
        cache_text([dataset], family, Accelerator(cpu=device.type == "cpu"))
        return dataset, family

    return make


def test_the_captions_used_last_are_remembered_in_every_tensor(monkeypatch):
    monkeypatch.setattr(text_memory, "MAX_CAPTIONS", 2)
    memory = TextMemory(encoding_counted(read := []), (), CPU, torch.bfloat16)
    for caption in ("a", "bb", "a", "ccc"):  # the last one takes the place of "bb"
        memory.conds([caption])
    found = memory.conds(["a", "ccc"])
    assert read == ["a", "bb", "ccc"]
    assert found["hidden"].shape == (2, 2, 3) and found["pooled"][:, 0].tolist() == [-1, -3]
    assert found["hidden"].dtype == torch.bfloat16


@pytest.mark.parametrize(("max_device_bytes", "max_host_bytes", "fits"), [(99, 99, True), (0, 99, True), (0, 1, False)])
def test_all_captions_are_read_where_they_fit(max_device_bytes, max_host_bytes, fits, monkeypatch):
    monkeypatch.setattr(text_memory, "MAX_DEVICE_BYTES", max_device_bytes)
    monkeypatch.setattr(text_memory, "MAX_HOST_BYTES", max_host_bytes)
    monkeypatch.setattr(text_memory, "MAX_CAPTIONS", 1)
    memory = TextMemory(encoding_counted(read := []), (), CPU, torch.float32)
    assert memory.fill(["a", "bb"], lambda: None) == memory.is_complete == fits
    read.clear()
    assert memory.conds(["bb", "a", "bb"])["hidden"][:, 0, 0].tolist() == [2, 1, 2]
    assert bool(read) != fits


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["x a, b"]),
        ({"caption_dropout_rate": 0.1}, ["x a, b", ""]),
        ({"caption_dropout_every_n_epochs": 2}, ["x a, b", ""]),
        ({"secondary_separator": " b"}, ["x a,,"]),
        ({"shuffle_caption": True}, None),
        ({"enable_wildcard": True}, None),
        ({"token_warmup_step": 0.5}, None),
        ({"caption_tag_dropout_rate": 0.1}, None),
    ],
)
def test_possible_captions_are_all_that_a_draw_can_give(options, wanted, tmp_path):
    subset = SubsetOptions(image_dir=tmp_path, caption_prefix="x", **options)
    assert possible_captions("a, b\nc", subset) == wanted
    found = {
        process_caption("a, b\nc", subset, step=0, epoch=epoch, max_train_steps=4, rng=random.Random(seed))
        for seed in range(100)
        for epoch in (1, 2)
    }
    assert wanted is None or found == set(wanted)


def test_training_asks_nothing_of_the_text_encoder_once_it_has_read_all(cached):
    dataset, family = cached(caption_dropout_rate=0.5)
    captions = [dataset[draw].caption for group in dataset.sampler() for draw in group] + [""]
    fresh = cached(shuffle_caption=True)[1]
    for text_encoder in family.text_encoders:
        text_encoder.to("meta")  # without its weights
    ours, wanted = family.conds(batch(captions)), fresh.conds(batch(captions))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_preview_has_the_same_prompts_before_and_after(cached):
    fresh, family = cached(shuffle_caption=True)[1], cached()[1]
    with torch.no_grad():
        first, again = (family.prompt_conds("a (cat:1.2)", "dog")["hidden"] for _ in range(2))
        assert torch.equal(first, fresh.prompt_conds("a (cat:1.2)", "dog")["hidden"])
    assert torch.equal(first, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_text_encoder_leaves_the_gpu_and_comes_back_for_previews_alone(cached, monkeypatch):
    monkeypatch.setattr(text_memory, "MAX_DEVICE_BYTES", 0)
    family = cached(torch.device("cuda"))[1]

    def devices() -> set[str]:
        return {value.device.type for part in family.parts.text_encoders for value in part.layers.parameters()}

    assert devices() == {"cpu"}
    assert family.conds(batch(["a cat, number 1"]))["hidden"].is_cuda
    assert family.prompt_conds("a cat", "")["hidden"].is_cuda
    assert devices() == {"cpu"}


@pytest.mark.parametrize(
    ("frozen", "precision"), [({"network_train_unet_only": True}, "no"), ({"text_encoder_lr": 0}, "bf16")]
)
def test_training_is_the_same_to_the_bit(frozen, precision, model_file, pictures, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    options = dict(
        mixed_precision=precision, train_batch_size=2, caption_dropout_rate=0.3, max_train_epochs=2,
        sample_prompts=prompts, sample_every_n_epochs=1,
    )  # fmt: skip
    for name, limit in (("beforehand", 2**30), ("when needed", 0)):
        monkeypatch.setattr(text_memory, "MAX_HOST_BYTES", limit)
        train(
            tiny.arguments(
                model_file, pictures, tmp_path / name, logging_dir=tmp_path / f"logs {name}", **options, **frozen
            )
        )
        assert ("5 different captions would take over 2 GB" in capsys.readouterr().err) == (limit == 0)
    first, second = (scalars(tmp_path / f"logs {name}")["loss/current"] for name in ("beforehand", "when needed"))
    assert first == second and len(first) == 8
    assert weights_equal(*(tmp_path / name / "lora.safetensors" for name in ("beforehand", "when needed")))
    drawn = [
        next((tmp_path / name / "sample").glob("lora_e000002*")).read_bytes() for name in ("beforehand", "when needed")
    ]
    assert drawn[0] == drawn[1]
