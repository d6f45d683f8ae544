"""A model that is the same as ever is not loaded to be compared, and another is never taken for it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.families.checkpoints import open_models
from library.families.detect import inspect_checkpoint
from library.families.parts import Part
from library.options.groups import ModelOptions
from library.training.known_sketches import TABLE, Sketch, known_sketch
from tests import tiny
from train_network import train

SKETCH = Sketch(np.array([0.1, -2.5e-7, 3], np.float32), {"mean": (1, 3)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder that is not there yet."""
    monkeypatch.setenv("ATHANOR_CACHE_DIR", str(tmp_path / "缓存"))
    return tmp_path / "缓存"


@pytest.fixture
def model(tiny_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_file, tmp_path / "模型 1.safetensors"))


def vae_of(path: Path) -> Part:
    return open_models(inspect_checkpoint(str(path)), ModelOptions()).vae


def is_asked(part: Part, what: str = "VAE", dtype: torch.dtype = torch.float32, sketch: Sketch = SKETCH) -> bool:
    """Whether a sketch is made anew; where it is not, it is the one that was made, to the bit."""
    asked = []
    found = known_sketch(what, [part], dtype, lambda: asked.append(part) or sketch)
    assert np.array_equal(found.values, sketch.values, equal_nan=True) and found.shapes == sketch.shapes
    return bool(asked)


def test_parts_of_the_same_file_are_asked_once(model):
    assert is_asked(vae_of(model))
    assert not is_asked(vae_of(model))
    assert is_asked(vae_of(model), what="another question")
    assert is_asked(vae_of(model), dtype=torch.bfloat16)
    assert not is_asked(vae_of(model))


@pytest.mark.parametrize("change", ["written over, with its old time", "replaced", "size"])
def test_another_file_at_the_same_path_is_another_model(change, model, tmp_path):
    assert is_asked(vae_of(model))
    times = model.stat().st_atime_ns, model.stat().st_mtime_ns
    weights = load_file(model)
    if change == "size":
        weights["more"] = torch.ones(3)
    name = "first_stage_model.encoder.conv_in.bias"
    save_file(weights | {name: weights[name] + 1}, tmp_path / "new")
    if change == "replaced":
        os.replace(tmp_path / "new", model)
    else:
        model.write_bytes((tmp_path / "new").read_bytes())
    os.utime(model, ns=times)
    assert is_asked(vae_of(model))


def test_a_model_that_changes_meanwhile_is_not_remembered(model):
    part = vae_of(model)

    def make() -> Sketch:
        os.utime(model, ns=(1, 1))
        return SKETCH

    known_sketch("VAE", [part], torch.float32, make)
    assert is_asked(part)


def test_a_model_that_gives_no_numbers_is_not_remembered(model):
    nothing = Sketch(np.full(2, np.nan, np.float32), {"mean": (2,)})
    assert is_asked(vae_of(model), sketch=nothing)
    assert is_asked(vae_of(model), sketch=nothing)


def test_a_model_that_is_changed_in_memory_is_not_known(model):
    assert is_asked(vae_of(model))
    adapted, kept = vae_of(model), vae_of(model)
    adapted.layers.encoder.conv_in.forward = lambda x: x
    kept.keep()
    assert is_asked(adapted) and is_asked(kept)


def test_other_settings_of_a_folder_are_another_model(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    assert is_asked(vae_of(folder))
    assert not is_asked(vae_of(folder))
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu"'))
    assert is_asked(vae_of(folder))


@pytest.mark.parametrize("damage", [('"values": "', '"values": "!'), ("1,\n    3", "null"), ("{", "")])
def test_what_is_remembered_may_be_broken(damage, model, cache):
    assert is_asked(vae_of(model))
    table = cache / TABLE
    assert damage[0] in table.read_text()
    table.write_text(table.read_text().replace(*damage))
    assert is_asked(vae_of(model))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_with_valid_caches_loads_the_unet_and_what_it_encodes(
    family, tiny_file, tiny_sdxl_file, pictures, tmp_path, monkeypatch, capfd
):
    fills = []
    fill = Part._fill
    monkeypatch.setattr(Part, "_fill", lambda part, target: fills.append(type(part.layers)) or fill(part, target))
    in_files = family == "sdxl"
    path = tiny_sdxl_file if in_files else tiny_file
    options = dict(network_train_unet_only=True, cache_latents_to_disk=True, max_train_steps=1)
    options |= dict(cache_text_encoder_outputs_to_disk=True) if in_files else {}
    arguments = tiny.arguments(path, pictures, tmp_path / "out", **options)
    train(arguments)
    fills.clear()
    train(arguments)
    assert [kind.__name__ for kind in fills] == ["CLIPTextModel", "UNet2DConditionModel"][in_files:]
    assert capfd.readouterr().err.count("of 4 pictures have theirs on disk") == 2 * (1 + in_files)
