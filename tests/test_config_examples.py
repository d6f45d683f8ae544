"""The configurations that are shipped, and the one of a public tutorial, train as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toml
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.results import metadata_of
from train_network import train

EXAMPLES = Path(__file__).parents[1] / "config_examples"

TUTORIAL = """
pretrained_model_name_or_path = "./sd-models/majicMIX_realistic-v7.safetensors"
train_data_dir = "./train/yabin-images"
resolution = "512,512"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
output_name = "yabin-lora"
output_dir = "./output/yabin-lora"
save_model_as = "safetensors"
save_every_n_epochs = 10
max_train_epochs = 100
train_batch_size = 1
network_train_unet_only = false
network_train_text_encoder_only = false
learning_rate = 0.0001
unet_lr = 0.0001
text_encoder_lr = 0.00001
lr_scheduler = "cosine_with_restarts"
optimizer_type = "AdamW8bit"
clip_skip = 2
save_precision = "fp16"
"""


def test_the_tutorials_file_trains_verbatim(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    tiny.write_file(Path("sd-models/majicMIX_realistic-v7.safetensors"))
    folder = Path("train/yabin-images/1_yabin-images")  # one step, as 512x512 takes its time
    folder.mkdir(parents=True)
    Image.effect_noise((300, 400), 80).convert("RGB").save(folder / "image1.jpg")
    (folder / "image1.txt").write_text("yabin, a girl", encoding="utf-8")
    Path("tutorial.toml").write_text(TUTORIAL, encoding="utf-8")
    caplog.set_level("INFO")
    train(["--config_file", "tutorial.toml", "--max_train_epochs", "1"])
    assert len(load_file("output/yabin-lora/yabin-lora.safetensors")) == 270
    assert "text encoder" in (table := capsys.readouterr().out) and "1e-05" in table and "0.0001" in table


# Not *_dataset.toml, which are for --dataset_config and stand in the examples that use them.
NAMES = sorted(path.name for path in EXAMPLES.glob("*.toml") if not path.stem.endswith("_dataset"))


@pytest.mark.parametrize("example", NAMES)
def test_every_example_trains_two_steps(example, request, tmp_path, capsys):
    train(words_for(example, request, tmp_path))
    assert load_file(tmp_path / "out" / "example.safetensors")
    assert "has no effect" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_launch_line_of_several_gpus_trains_in_two_processes(request, tmp_path):
    text = (EXAMPLES / "several_gpus.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^# +accelerate launch (.* train_network.py) --config_file .*/several_gpus.toml$", text, re.M)
    words = words_for("several_gpus.toml", request, tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *line.split(), *words],
        cwd=EXAMPLES.parent, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "x 2 processes" in ended.stdout + ended.stderr
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == ["example-run.json", "example.safetensors"]
    metadata = metadata_of(tmp_path / "out" / "example.safetensors")
    assert (metadata["ss_steps"], metadata["ss_total_batch_size"]) == ("2", "4")


def toy_model(wanted: dict) -> str:
    """The fixture of the toy model that an example is for."""
    if "sdxl" in wanted["pretrained_model_name_or_path"]:
        return "tiny_sdxl_file"
    return "tiny_sd2_file" if wanted.get("v2") else "tiny_file"


def words_for(example: str, request: pytest.FixtureRequest, folder: Path) -> list[str]:
    """The command line that trains an example for two steps on a toy model and toy pictures made in `folder`."""
    wanted = toml.load(EXAMPLES / example)
    if wanted.get("optimizer_type") == "Prodigy":
        pytest.importorskip("prodigyopt", reason="Prodigy is an optional package")
    if wanted.get("network_module", "").startswith("lycoris"):
        pytest.importorskip("lycoris", reason="LyCORIS is an optional package")
    pictures = tiny.write_pictures(folder / "train")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    replaced = {
        "pretrained_model_name_or_path": request.getfixturevalue(toy_model(wanted)),
        "output_dir": folder / "out",
        "output_name": "example",
        "max_train_epochs": "",
        "max_train_steps": 2,
        "mixed_precision": "no",
        "min_bucket_reso": 64,
    }
    replacements = {  # of what only some examples have, made when asked for
        "train_data_dir": lambda: pictures,
        "resolution": lambda: "128,128",
        "sample_prompts": lambda: folder / "prompts.txt",
        "logging_dir": lambda: folder / "logs",
        "reg_data_dir": lambda: tiny.write_pictures(folder / "reg", "1_animal"),
        "conditioning_data_dir": lambda: write_masks(folder / "masks", pictures),
        "dataset_config": lambda: write_dataset_config(EXAMPLES.parent / wanted["dataset_config"], pictures),
    }
    replaced |= {name: make() for name, make in replacements.items() if name in wanted}
    words = [word for name, value in replaced.items() for word in (f"--{name}", str(value))]
    return ["--config_file", str(EXAMPLES / example), "--strict_config", *words]


def write_masks(folder: Path, pictures: Path) -> Path:
    """A mask for each picture, white on the left."""
    folder.mkdir()
    for path in pictures.glob("*/*.png"):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 25)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / path.name)
    return folder


def write_dataset_config(shipped: Path, pictures: Path) -> Path:
    """A shipped dataset file with toy pictures, a quarter as large; the pictures are made large enough for it."""
    config = toml.load(shipped)
    for picture in pictures.glob("*/*.png"):
        with Image.open(picture) as image:
            larger = image.resize((image.width * 4, image.height * 4))
        larger.save(picture)
    for dataset in config["datasets"]:
        dataset["resolution"] //= 4
        for subset in dataset["subsets"]:
            subset["image_dir"] = str(next(pictures.iterdir()))
    path = pictures.parent / "dataset.toml"
    path.write_text(toml.dumps(config), encoding="utf-8")
    return path
