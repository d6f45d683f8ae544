"""The memory estimated without a GPU is what the tensors of a real step take."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from library.families.detect import inspect_checkpoint
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.recipes.memory_table import empty_batch, estimate, memory_table
from library.recipes.network import load_family, prepare_unet
from library.recipes.network_building import build_network, load_algorithm
from library.training.memory_estimate import LiveBytes
from tests import tiny

SIZE = (256, 192)
LARGER = (512, 384)


def options_for(model, pictures, tmp_path, **more) -> TrainNetworkOptions:
    return read_options(TrainNetworkOptions, tiny.arguments(model, pictures, tmp_path / "out", **more))


def family_name(model) -> str:
    return {"sd1": "sd", "sdxl": "sdxl"}[inspect_checkpoint(str(model)).kind]


def test_each_saver_saves_and_all_of_them_most(tiny_sdxl_file, pictures, tmp_path):
    given = {"mixed_precision": "bf16", "train_batch_size": 2, "optimizer_type": "AdamW8bit", "full_bf16": True}
    lines = memory_table(options_for(tiny_sdxl_file, pictures, tmp_path, **given), "sdxl", LARGER, False).splitlines()
    rows = {words[0]: words for line in lines[2:] if (words := re.split(r"\s{2,}", line))}
    names = [
        "--network_train_unet_only",
        "--gradient_checkpointing",
        "--train_batch_size 1",
        "--fp8_base",
        "--cpu_offload_checkpointing",
        "--base_quantization nf4",
    ]
    assert list(rows) == ["as it is", *names, "all of these"]
    assert max(map(len, lines)) <= 100
    in_training = {name: sum(map(float, words[1:4])) for name, words in rows.items()}
    assert (
        max(in_training, key=in_training.get) == "as it is" and min(in_training, key=in_training.get) == "all of these"
    )


def test_where_a_gpu_is_nothing_is_pinned_that_has_no_memory(tiny_file, pictures, tmp_path, monkeypatch):
    savers = dict(gradient_checkpointing=True, cpu_offload_checkpointing=True)
    options = options_for(tiny_file, pictures, tmp_path, **savers)
    without = estimate(options, "sd", SIZE, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert estimate(options, "sd", SIZE, False) == without


def test_frozen_text_encoders_stay_where_captions_change(tiny_sdxl_file, pictures, tmp_path):
    options = options_for(tiny_sdxl_file, pictures, tmp_path, network_train_unet_only=True)
    of_one, of_many = (estimate(options, "sdxl", SIZE, captions_change).training for captions_change in (False, True))
    assert of_one < of_many


def test_compiled_runs_are_estimated_as_they_would_be_without(tiny_sdxl_file, pictures, tmp_path):
    options = options_for(tiny_sdxl_file, pictures, tmp_path, torch_compile=True)
    assert estimate(options, "sdxl", SIZE, False) == estimate(
        replace(options, torch_compile=False), "sdxl", SIZE, False
    )


def test_a_network_that_begins_with_the_weights_is_estimated_without_them(tiny_file, pictures, tmp_path):
    given = {"network_dim": 2, "cache_latents": True}
    plain, pissa = (
        estimate(options_for(tiny_file, pictures, tmp_path, **given, **more), "sd", SIZE, captions_change=False)
        for more in ({}, {"network_args": ["init=pissa"]})
    )
    assert pissa.num_trained == plain.num_trained > 0
    assert pissa.step > plain.step  # it computes with twice the rank


def real_step_bytes(options: TrainNetworkOptions, name: str) -> tuple[int, int]:
    """Frozen weights, and what more lives at the peak of a step of the U-Net's network, of real tensors."""
    cpu = torch.device("cpu")
    family = load_family(options, name, cpu)
    network = build_network(load_algorithm("networks.lora"), family, options, {}).train()
    prepare_unet(family, network, replace(options, no_onednn=True))  # whose products take more
    batch = empty_batch(options.train_batch_size, SIZE)
    conds = family.conds(batch)
    latents = torch.zeros(options.train_batch_size, 4, SIZE[1] // 8, SIZE[0] // 8)
    with LiveBytes("cpu") as memory:
        memory.note_all(family.unet)
        for value in (latents, *conds.values()):
            memory.note(value)
        frozen = memory.now
        network.flatten([{"params": list(network.parameters())}], torch.float32)
        prediction = family.predict(latents, torch.zeros(len(latents)), conds)
        F.mse_loss(prediction, latents).backward()
    return frozen, memory.peak - frozen - network.flat.num_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_the_meta_device_takes_what_a_real_one_takes(model_file, pictures, tmp_path, checkpointing):
    options = options_for(
        model_file, pictures, tmp_path,
        cache_latents=True, network_train_unet_only=True, train_batch_size=2, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    found = estimate(options, family_name(model_file), SIZE, captions_change=False)
    frozen, step = real_step_bytes(options, family_name(model_file))
    assert found.frozen == pytest.approx(frozen, rel=0.02)
    assert found.step == pytest.approx(step, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_gpu_allocates_what_was_estimated(tiny_sdxl_file, pictures, tmp_path, checkpointing):
    options = options_for(
        tiny_sdxl_file, pictures, tmp_path,
        cache_latents=True, network_train_unet_only=True, train_batch_size=4, gradient_checkpointing=checkpointing,
        mixed_precision="bf16",
    )  # fmt: skip
    size, device = (1024, 768), torch.device("cuda")
    found = estimate(options, "sdxl", size, captions_change=False)
    family = load_family(options, "sdxl", device)
    network = build_network(load_algorithm("networks.lora"), family, options, {}).to(device).train()
    network.flatten([{"params": list(network.parameters())}], family.dtype)
    family.remember_text(["a picture"], lambda: None)
    conds = family.conds(empty_batch(4, size))
    prepare_unet(family, network, options)
    latents = torch.zeros(4, 4, size[1] // 8, size[0] // 8, device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prediction = family.predict(latents, torch.zeros(4, device=device), conds)
    F.mse_loss(prediction.float(), latents).backward()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(found.step, rel=0.15)
