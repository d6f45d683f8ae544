"""The configurations that are shipped, and the one of a public tutorial, train as they are."""

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
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
    folder = Path("train/yabin-images/2_yabin-images")
    folder.mkdir(parents=True)
    for index, size in enumerate([(640, 512), (300, 400)], start=1):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"image{index}.jpg")
        (folder / f"image{index}.txt").write_text("yabin, a girl", encoding="utf-8")
    Path("tutorial.toml").write_text(TUTORIAL, encoding="utf-8")
    caplog.set_level("INFO")
    train(["--config_file", "tutorial.toml", "--max_train_epochs", "1"])
    assert len(load_file("output/yabin-lora/yabin-lora.safetensors")) == 270
    assert "text encoder" in (table := capsys.readouterr().out) and "1e-05" in table and "0.0001" in table


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_every_example_trains_two_steps(example, tiny_file, pictures, tmp_path):
    if "lycoris" in example:
        pytest.importorskip("lycoris", reason="the package lycoris-lora is not installed")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    tiny.write_pictures(tmp_path / "reg", "1_animal")
    replaced = {
        "pretrained_model_name_or_path": tiny_file,
        "train_data_dir": pictures,
        "output_dir": tmp_path / "out",
        "output_name": "example",
        "resolution": "128,128",
        "max_train_epochs": "",
        "max_train_steps": 2,
        "mixed_precision": "no",
        "sample_prompts": prompts,
        "logging_dir": tmp_path / "logs",
        "min_bucket_reso": 64,
    }
    if "reg_data_dir" in (EXAMPLES / example).read_text(encoding="utf-8"):
        replaced["reg_data_dir"] = tmp_path / "reg"
    words = [word for name, value in replaced.items() for word in (f"--{name}", str(value))]
    train(["--config_file", str(EXAMPLES / example), *words])
    assert load_file(tmp_path / "out" / "example.safetensors")
