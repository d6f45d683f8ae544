"""Grids of pictures: networks of a run taking turns on one model, and going on where a grid was interrupted."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gen_img
from library.errors import UserError
from library.generating import drawing
from library.generating.axes import numbers_of
from library.generating.runs import find_run
from tests import tiny
from train_network import train

xyz_grid = importlib.import_module("tools.xyz_grid")
PROMPTS = "a cat --w 64 --h 64 --s 2 --d 7\na dog, 狗 --w 64 --h 64 --s 2 --d 8"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_file) -> Path:
    """OUTPUT_DIR/NAME of a run of three epochs with its grid."""
    folder = tmp_path_factory.mktemp("run 跑")
    more = {"sample_prompts": PROMPTS, "max_train_epochs": 3, "save_every_n_epochs": 1, "learning_rate": 0.01}
    more |= {"grid_after_training": True, "sample_every_n_epochs": 1}
    train(tiny.arguments(tiny_file, tiny.write_pictures(folder / "train"), folder / "out", **more))
    return folder / "out/lora"


def grid(run: Path, out: Path, *words: object) -> list[str]:
    """The names of the cells after the grid was drawn."""
    xyz_grid.main(["--run", str(run), "--output", str(out), *map(str, words)])
    return sorted(path.name for path in (out / "cells").iterdir())


def test_after_training_there_is_a_grid_of_saved_epochs_and_strengths_for_each_prompt(run):
    folder = run.parent / "lora-grid"
    assert {path.name for path in folder.iterdir()} == {"cells", "grid.html", "grid-01.png", "grid-02.png"}
    page = (folder / "grid.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(list((folder / "cells").iterdir())) == 3 * 6 * 2
    assert "epoch 1" in page and "狗" in page and "http" not in page


def test_a_cell_is_what_gen_img_draws_and_the_grid_after_training_drew(run, tiny_file, tmp_path):
    (name,) = grid(run, tmp_path, "--x", "epoch=2", "--y", "strength=0.7", "--z", "prompt=1")
    assert name in {path.name for path in (run.parent / "lora-grid/cells").iterdir()}
    network = ["--network_weights", str(run.parent / "lora-000002.safetensors"), "--network_mul", "0.7"]
    words = ["--ckpt", str(tiny_file), *network, "--prompt", PROMPTS.split("\n")[0], "--outdir", str(tmp_path)]
    gen_img.main(words)
    (picture,) = tmp_path.glob("im_*.png")
    assert np.array_equal(pixels(tmp_path / "cells" / name), pixels(picture))
    assert np.array_equal(pixels(run.parent / "lora-grid/cells" / name), pixels(picture))


def test_an_interrupted_grid_goes_on_with_what_is_missing(run, tmp_path, monkeypatch):
    words = ["--x", "epoch=0,1,last", "--y", "seed=1-3", "--z", "sampler=ddim,euler_a"]
    names = grid(run, tmp_path, *words)
    assert len(names) == 18
    first = {name: pixels(tmp_path / "cells" / name) for name in names}
    kept = names[:10]
    for name in names[10:]:
        (tmp_path / "cells" / name).unlink()
    drawn = []
    draw = drawing.Artist.draw
    monkeypatch.setattr(drawing.Artist, "draw", lambda self, requests: drawn.append(1) or draw(self, requests))
    assert grid(run, tmp_path, *words) == names and len(drawn) == len(names) - len(kept)
    assert all(np.array_equal(first[name], pixels(tmp_path / "cells" / name)) for name in names)


def test_strength_0_is_drawn_once_for_all_epochs_and_settings_of_prompts_stay(run, tmp_path):
    names = grid(run, tmp_path, "--x", "epoch", "--y", "strength=0", "--z", "cfg=2,3")
    assert len(names) == 2
    assert {Image.open(tmp_path / "cells" / name).size for name in names} == {(64, 64)}


def test_other_axes_go_before_what_a_prompt_says(run, tmp_path):
    names = grid(run, tmp_path, "--x", "prompt", "--y", "seed=3,4", "--z", "strength=1")
    assert len(names) == 4 == len({pixels(tmp_path / "cells" / name).tobytes() for name in names})


def test_texts_are_encoded_once_where_networks_leave_text_encoders_alone(tiny_file, tmp_path, monkeypatch):
    more = {"network_train_unet_only": True, "max_train_epochs": 2, "save_every_n_epochs": 1, "learning_rate": 0.01}
    train(tiny.arguments(tiny_file, tiny.write_pictures(tmp_path / "train"), tmp_path / "out", **more))
    from library.families.sd import Sd

    encoded, encode = [], Sd.prompt_conds
    monkeypatch.setattr(Sd, "prompt_conds", lambda self, *a, **k: encoded.append(a) or encode(self, *a, **k))
    names = grid(tmp_path / "out/lora", tmp_path / "grid", "--prompts", PROMPTS, "--y", "strength=0.5,1")
    assert len(names) == 8 and len(encoded) == 2


def test_numbers_and_ranges():
    assert numbers_of("0.5-1.0", "--y", "strength", 0.1) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert numbers_of("-1,0-1:0.25", "--y", "strength", 0.1) == [-1, 0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(UserError, match="strength takes numbers and ranges"):
        numbers_of("1-0", "--y", "strength", 0.1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--x", "epoch=9"], "there is no file of 9; there are 1, 2, 3"),
        (["--x", "colour"], "there is no axis 'colour'"),
        (["--x", "seed"], "--x: seed needs values"),
        (["--x", "strength", "--y", "strength"], "must change different things"),
        (["--z", "prompt=3"], "there is no prompt 3; there are 2"),
        (["--ckpt", "gone.safetensors"], "--ckpt"),
    ],
)
def test_mistakes_are_sentences(words, sentence, run, tmp_path):
    with pytest.raises(UserError) as caught:
        grid(run, tmp_path / "out", *words)
    assert sentence in str(caught.value) and not (tmp_path / "out").exists()


def test_a_run_is_found_by_name_file_or_folder(run):
    for text in (run, f"{run}.safetensors", f"{run}-run.json", run.parent):
        assert [saved.label for saved in find_run(str(text)).networks] == ["epoch 1", "epoch 2", "epoch 3"]
    with pytest.raises(UserError, match="there is no run"):
        find_run(str(run.parent / "other"))
    record = json.loads((run.parent / "lora-run.json").read_text(encoding="utf-8"))
    assert len(record["curves"]["loss"]["points"]) == record["progress"]["steps"][0]
