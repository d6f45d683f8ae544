"""A base in fewer bits is rounded layer by layer as it is read: the same bits, and no two layers whole at once."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.families.checkpoint_files import Target
from library.families.checkpoints import open_models
from library.families.detect import inspect_checkpoint
from library.families.parts import Part
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import hold_in_nf4
from library.options.cli import read_options
from library.options.derived import rounds_text
from library.options.groups import ModelOptions, TrainNetworkOptions
from library.recipes.memory_table import META, estimate
from library.recipes.network import load_family
from library.training.memory_estimate import LiveBytes
from tests import tiny
from tests.results import weights_equal
from tests.test_memory_table import options_for
from train_network import train

HOLDS = {"fp8": hold_in_fp8, "int8": hold_in_int8, "nf4": hold_in_nf4}
BF16 = Target(torch.bfloat16)
holds = pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)


def opened_unet(path: Path) -> Part:
    return open_models(inspect_checkpoint(str(path)), ModelOptions()).unet


def contents(model: nn.Module) -> dict[str, object]:
    """Weights, classes, and what layers know beside them."""
    known = {
        f"{path} {name}": getattr(layer, name)
        for path, layer in model.named_modules()
        for name in ("scale", "compute_dtype", "weight_shape", "__class__")
        if hasattr(layer, name) and not isinstance(getattr(layer, name), Tensor)
    }
    return known | model.state_dict()


def assert_same(ours: dict[str, object], wanted: dict[str, object]) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        same = torch.equal if isinstance(value, Tensor) else lambda one, other: one == other
        assert same(value, wanted[name]), name


@pytest.fixture(params=["file", "folder", "pickles"])
def model(request: pytest.FixtureRequest, tiny_file: Path, tmp_path: Path) -> Path:
    if request.param == "file":
        return tiny_file
    folder = tiny.write_folder(tmp_path / "model")
    if request.param == "pickles":
        tiny.models().unet.save_pretrained(folder / "unet", safe_serialization=False)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@holds
def test_a_part_has_the_bits_of_one_that_is_rounded_when_it_is_whole(hold, model):
    whole, ours = opened_unet(model).loaded(BF16), opened_unet(model)
    hold(whole)
    ours.hold_in(hold)
    assert ours.file is None  # its numbers are not those of the file
    assert_same(contents(ours.loaded(BF16)), contents(whole))
    ours.release()
    assert_same(contents(ours.loaded(BF16)), contents(whole))


@holds
def test_no_two_layers_are_whole_at_once(hold, model, monkeypatch):
    read, storages, alive = Part._read, {}, []

    def noted_read(part: Part, name: str, *others: object) -> Tensor:
        value = read(part, name, *others)
        storages[name] = weakref.ref(value.untyped_storage())
        alive.append({name for name, storage in storages.items() if storage()})
        return value

    monkeypatch.setattr(Part, "_read", noted_read)
    part = opened_unet(model)
    part.hold_in(hold)
    left = dict(part.loaded(BF16).named_parameters())
    rounded = storages.keys() - left.keys()
    assert len(rounded) > 40
    assert max(len(names & rounded) for names in alive) == 1


def peak_and_rest(options: TrainNetworkOptions) -> tuple[int, int]:
    """Bytes on the device as the U-Net is read, and when it is there."""
    family = load_family(options, "sdxl", META)
    with LiveBytes() as memory:
        memory.ignore(family.parts.unet.layers)
        _ = family.unet
    return memory.peak, memory.now


@pytest.mark.parametrize(
    "more",
    [{"fp8_base_unet": True}, {"base_quantization": "int8"}, {"base_quantization": "nf4"},
     {"base_quantization": "nf4", "blocks_to_swap": 18}],
)  # fmt: skip
def test_while_it_is_read_the_device_holds_little_more_than_in_the_end(more, tiny_sdxl_file, pictures, tmp_path):
    given = options_for(tiny_sdxl_file, pictures, tmp_path, mixed_precision="bf16", **more)
    peak, rest = peak_and_rest(given)
    hold = HOLDS[given.base_quantization or "fp8"]
    weights = [weight for weight in tiny.models("sdxl").unet.parameters() if weight.ndim > 1]
    with LiveBytes() as of_one, META:
        hold(nn.Linear(max(weight.numel() for weight in weights) // 64, 64, bias=False, dtype=torch.bfloat16))
    whole = sum(2 * weight.numel() for weight in weights)
    assert peak - rest <= 1.1 * of_one.peak  # with what rounding itself takes
    if given.blocks_to_swap:
        assert rest < 0.15 * whole  # what waits is no memory of the device


@pytest.mark.parametrize("more", [{"base_quantization": "nf4"}, {"fp8_base_unet": True}])
def test_the_estimate_before_training_has_no_whole_unet(more, tiny_sdxl_file, pictures, tmp_path):
    words = dict(mixed_precision="bf16", cache_latents=True, network_train_unet_only=True)
    plain, swapped, rounded = (
        estimate(options_for(tiny_sdxl_file, pictures, tmp_path, **words, **given), "sdxl", (64, 64), False).before
        for given in ({}, {"blocks_to_swap": 18}, more)
    )
    assert rounded == swapped < plain  # that of the text encoders, which are larger here


def test_base_weights_are_merged_before_layers_are_rounded(tiny_file, pictures, tmp_path):
    """As they would be into a model that is whole: the merged model, saved, gives the same when it is rounded."""
    words = dict(learning_rate=0.05, network_args=["conv_dim=2", "train_norm=True", "train_bias=True"])
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **words))
    path = str(tmp_path / "out" / "lora.safetensors")
    given = dict(base_weights=path, base_weights_multiplier=0.5)
    families = {
        name: load_family(options_for(tiny_file, pictures, tmp_path, **given, **more), "sd", torch.device("cpu"))
        for name, more in (("merged", {}), ("rounded", {"fp8_base": True}))
    }
    plain = load_family(options_for(tiny_file, pictures, tmp_path), "sd", torch.device("cpu"))
    wanted = [families["merged"].unet, families["merged"].text_encoder]
    assert not all(torch.equal(*pair) for pair in zip(wanted[0].parameters(), plain.unet.parameters(), strict=True))
    for model in wanted:
        hold_in_fp8(model)
    ours = [families["rounded"].unet, families["rounded"].text_encoder]
    for one, other in zip(ours, wanted, strict=True):
        assert_same(contents(one), contents(other))


def test_fp8_is_one_of_the_quantizations(tiny_file, pictures, tmp_path):
    words = dict(max_train_epochs=None, max_train_steps=2, learning_rate=0.01)
    for name, more in (("one", {"base_quantization": "fp8"}), ("other", {"fp8_base_unet": True})):
        train(tiny.arguments(tiny_file, pictures, tmp_path / name, **words, **more))
    assert weights_equal(tmp_path / "one" / "lora.safetensors", tmp_path / "other" / "lora.safetensors")
    both = tiny.arguments(tiny_file, pictures, tmp_path / "out", base_quantization="fp8", fp8_base=True)
    assert rounds_text(read_options(TrainNetworkOptions, both))  # no contradiction: the U-Net is in fp8 with each


@pytest.mark.parametrize("rate", [0.001, 0.0])
def test_ggpo_finds_the_weights_of_layers_that_are_trained(rate, tiny_file, pictures, tmp_path):
    """Frozen text encoders are gone by then, and nothing is asked of them."""
    words = dict(network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01"], text_encoder_lr=rate, max_train_steps=1)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", fp8_base_unet=True, max_train_epochs=None, **words))
    assert (tmp_path / "out" / "lora.safetensors").exists()
