"""Mistakes, as a user makes them on the command line: one sentence each, exit code 2, before torch is imported."""

import contextlib
import importlib.metadata
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library import folders
from library.dataset import picture_index
from library.dataset.scan import scan_dataset
from library.files import why_not_writable
from library.options.convert import Mismatch, convert
from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from library.preflight import problems_of_files

ROOT = Path(__file__).parents[1]

# Python that refuses to import what is heavy, so that a mistake found too late shows.
LIGHT = """
import sys
from importlib.machinery import PathFinder
class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "accelerate", "numpy", "cv2"):
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = self
            return spec
    def create_module(self, spec):
        raise RuntimeError(f"{spec.name} was imported before the mistake was found")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Heavy())
sys.argv[0] = "train_network.py"
sys.path.insert(0, ".")
import train_network
train_network.run_script(train_network.train)
"""


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", LIGHT, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file with a right header and no more bytes than it promises."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(offset))
    return path


SD1 = {
    "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (4, 4),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias": (4,),
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias": (4,),
    "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
}
SDXL = {
    "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
    "conditioner.embedders.1.model.token_embedding.weight": (4, 4),
}
VAE16 = {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 16, 3, 3)}
REFINER = {
    "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
    "conditioner.embedders.0.model.token_embedding.weight": (4, 4),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a checkpoint, a dataset and a configuration that would train if the checkpoint were whole."""
    write_checkpoint(tmp_path / "model.safetensors", SD1)
    folder = tmp_path / "train" / "2_yabin"
    folder.mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (64, 64), (index * 40, 0, 0)).save(folder / f"图 {index}.png")
        (folder / f"图 {index}.txt").write_text("yabin", encoding="utf-8")
    (tmp_path / "lora.toml").write_text(
        'pretrained_model_name_or_path = "model.safetensors"\ntrain_data_dir = "train"\n'
        'resolution = "64,64"\noutput_dir = "out"\nlearning_rate = 1e-4\n',
        encoding="utf-8",
    )
    return tmp_path


def write_line(project: Path, line: str) -> None:
    with open(project / "lora.toml", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def cut_picture(project: Path) -> None:
    for index in (0, 2):
        path = project / "train" / "2_yabin" / f"图 {index}.png"
        path.write_bytes(path.read_bytes()[:60])


def write_dataset_config(project: Path) -> None:
    subset = '[[datasets.subsets]]\nimage_dir = "nowhere"\n'
    dataset = f"[[datasets]]\nresolution = 64\n{subset}"
    (project / "sets.toml").write_text(2 * dataset, encoding="utf-8")


def make_refiner(project: Path) -> None:
    write_checkpoint(project / "model.safetensors", REFINER)


def cut_model(project: Path) -> None:
    path = project / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def empty_dataset(project: Path) -> None:
    for path in (project / "train" / "2_yabin").iterdir():
        path.unlink()


def write_folder(project: Path) -> None:
    (project / "folder" / "text_encoder").mkdir(parents=True)
    (project / "folder" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (project / "folder" / "text_encoder" / "config.json").write_text(
        '{"num_hidden_layers": 5, "_class_name": "CLIPTextModel"}'
    )


def write_network(project: Path, layer: str, *inputs: int) -> None:
    """A network of rank 8 with one layer."""
    write_checkpoint(project / "net.safetensors", {f"{layer}.lora_down.weight": (8, *inputs)})


MISTAKES: dict[str, tuple[Callable[[Path], object] | None, list[str], str]] = {
    "unknown key": (
        lambda p: write_line(p, "network_dimm = 8"), ["--strict_config"], r"lora\.toml:6.*network_dimm.*network_dim"
    ),
    "key that stands twice": (
        lambda p: write_line(p, "learning_rate = 1e-4"), [], r"toml:6: .*learning_rate stands twice, first on line 5"
    ),
    "two values": (None, ["--resolution", "128", "96"], r"--resolution takes one value, got '128' and '96': write"),
    "two files": (None, ["--config_file", "other.toml"], r"--config_file is given twice, lora\.toml and other\.toml"),
    "too large": (None, ["--resolution", "100000"], r"--resolution must be at most 16384 pixels a side, got '100000'"),
    "no timesteps": (None, ["--min_timestep", "800", "--max_timestep", "500"], r"800 is above --max_timestep 500"),
    "pointer of git-lfs": (
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n"), [],
        r"model\.safetensors is not the file itself but git-lfs's pointer to it: run `git lfs pull`"
    ),
    "missing folder of a dataset": (
        write_dataset_config, ["--dataset_config", "sets.toml"], r"sets\.toml:4: image_dir: there is no folder nowhere"
    ),
    "wrong type": (lambda p: write_line(p, 'train_batch_size = "many"'), [], r"lora\.toml:6.*train_batch_size.*many"),
    "bad choice": (lambda p: write_line(p, 'mixed_precision = "fp32"'), [], r"mixed_precision.*fp16.*bf16.*fp32"),
    "not toml": (lambda p: write_line(p, "resolution: 512"), [], r"lora\.toml.*6"),
    "unknown flag": (None, ["--learning_rat", "1", "--lerning_rate", "1e-4"], r"--lerning_rate.*--learning_rate"),
    "no model": (None, ["--pretrained_model_name_or_path", "sd/none.ckpt"], r"none\.ckpt.*does not exist"),
    "hub name": (None, ["--pretrained_model_name_or_path", "runwayml/stable-diffusion-v1-5"], r"nothing is downloaded"),
    "refiner": (make_refiner, [], r"a Stable Diffusion XL refiner; this version trains a Stable Diffusion 1\.x"),
    "bucket steps": (
        None, ["--enable_bucket", "--min_bucket_reso", "64", "--bucket_reso_steps", "32"],
        r"--bucket_reso_steps .* multiple of 64",
    ),
    "cut model": (cut_model, [], r"model\.safetensors is cut off"),
    "text as model": (lambda p: (p / "model.safetensors").write_text("hello"), [], r"not a safetensors file"),
    "missing folder": (None, ["--train_data_dir", "nowhere"], r"no folder nowhere"),
    "too deep": (None, ["--train_data_dir", "train/2_yabin"], r"use its parent .*train"),
    "too shallow": (None, ["--train_data_dir", "."], r"did you mean train\?"),
    "no repeats": (lambda p: (p / "train/2_yabin").rename(p / "train/yabin"), [], r"rename yabin to e\.g\. 10_yabin"),
    "empty": (empty_dataset, [], r"there are no pictures in train/2_yabin"),
    "bad pictures": (cut_picture, [], r"2 pictures cannot be read: .*图 0\.png.*图 2\.png"),
    "output is a file": (lambda p: (p / "out").write_text(""), [], r"--output_dir must be a folder, but out is a file"),
    "output is a folder": (
        lambda p: (p / "out/last.safetensors").mkdir(parents=True),
        [],
        r"--output_name: out/last\.safetensors, where the network is to be written, is a folder",
    ),
    "output below a file": (None, ["--output_dir", "lora.toml/out"], r"--output_dir: .*lora\.toml is a file"),
    "impossible": (None, ["--cache_latents", "--color_aug"], r"color_aug.*cache_latents|cache_latents.*color_aug"),
    "both only": (None, ["--network_train_unet_only", "--network_train_text_encoder_only"], r"network_train_unet_only"),
    "network by its file": (None, ["--network_module", "networks/lora.py"], r"must be a name such as networks\.lora"),
    "network with an ending": (None, ["--network_module", "networks.lora.py"], r"without \.py, got 'networks\.lora\.p"),
    "network in a network": (None, ["--network_module", "networks.lora.dora"], r"no network networks\.lora\.dora.*dyl"),
    "optimizer by a path": (None, ["--optimizer_type", "../x"], r"--optimizer_type must be a name such as AdamW"),
    "no network": (None, ["--network_module", "networks.lorra"], r"networks\.lorra.*networks\.lora"),
    "network argument": (None, ["--network_args", "conv_dimm=4"], r"has no argument conv_dimm; did you mean conv_dim"),
    "prompt file": (None, ["--sample_prompts", "none.txt", "--sample_at_first"], r"none\.txt"),
    "vae": (None, ["--vae", "none.safetensors"], r"--vae.*none\.safetensors"),
    "vae of another model": (
        lambda p: write_checkpoint(p / "xl.safetensors", SDXL), ["--vae", "xl.safetensors"],
        r"--vae: xl\.safetensors is a Stable Diffusion XL base model, whose VAE does not fit model\.safetensors"
    ),
    "vae with other latents": (
        lambda p: write_checkpoint(p / "vae.safetensors", VAE16), ["--vae", "vae.safetensors"],
        r"--vae: vae\.safetensors makes latents of 16 channels; .* 4"
    ),
    "folder of another part as vae": (
        write_folder, ["--vae", "folder/text_encoder"], r"--vae: the folder folder/text_encoder holds a CLIPTextModel"
    ),
    "in_json": (None, ["--in_json", "none.json"], r"--in_json.*none\.json"),
    "cut json": (
        lambda p: (p / "cut.json").write_text('{"a.png":\n{'), ["--in_json", "cut.json"], r"cut\.json:2: not JSON"
    ),
    "thumbnail": (None, ["--metadata_thumbnail", "lora.toml"], r"--metadata_thumbnail: lora\.toml is no picture"),
    "clip_skip": (None, ["--clip_skip", "3"], r"--clip_skip must be at most 2, .*model\.safetensors, got 3"),
    "clip_skip of a folder": (
        write_folder, ["--pretrained_model_name_or_path", "folder", "--clip_skip", "6"],
        r"--clip_skip must be at most 5"
    ),
    "a model as network": (
        None, ["--network_weights", "model.safetensors"],
        r"--network_weights: model\.safetensors is a Stable Diffusion 1\.x model; wanted is a network",
    ),
    "network of another base": (
        lambda p: write_network(p, "lora_unet_input_blocks_4_1_proj_in", 64), ["--network_weights", "net.safetensors"],
        r"--network_weights: net\.safetensors is a network for a Stable Diffusion XL base model, but .*1\.x",
    ),
    "base weights of another base": (
        lambda p: write_network(p, "lora_unet_mid_block_attn2_to_k", 1024), ["--base_weights", "net.safetensors"],
        r"--base_weights: net\.safetensors is a network for a Stable Diffusion 2\.x model, but .*1\.x",
    ),
    "network of another rank": (
        lambda p: write_network(p, "lora_unet_mid_block_attn2_to_k", 768),
        ["--network_weights", "net.safetensors", "--network_dim", "16", "--network_train_unet_only"],
        r"--network_weights: net\.safetensors has rank 8, but --network_dim is 16; .*--dim_from_weights",
    ),
    "network of another algorithm": (
        lambda p: write_checkpoint(p / "net.safetensors", {"lora_unet_mid_block_attn2_to_k.hada_w1_a": (8, 768)}),
        ["--base_weights", "net.safetensors"],
        r"--base_weights: net\.safetensors is no LoRA as networks\.lora has it: 1 weight .*hada_w1_a",
    ),
    "network without a part": (
        lambda p: write_network(p, "lora_unet_mid_block_attn2_to_k", 768),
        ["--network_weights", "net.safetensors", "--network_dim", "8"],
        r"--network_weights: net\.safetensors does not fit this run: it has no layers of the text encoder, .*unet_only",
    ),
    "network with a part that is left out": (
        lambda p: write_network(p, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768),
        ["--network_weights", "net.safetensors", "--network_train_unet_only", "--dim_from_weights"],
        r"net\.safetensors does not fit this run: it has 1 layer of the text encoder, and --network_train_unet_only",
    ),
    "network with convolutions": (
        lambda p: write_network(p, "lora_unet_down_blocks_0_resnets_0_conv1", 64, 3, 3),
        ["--network_weights", "net.safetensors", "--network_train_unet_only"],
        r"net\.safetensors does not fit this run: it has 1 layer of 3x3 convolutions, and .* no conv_dim",
    ),
    "fp16 without a GPU": (None, ["--mixed_precision", "fp16"], r"--mixed_precision fp16 needs a GPU, and .*\+cpu"),
    "sparse gradients": (None, ["--optimizer_type", "SparseAdam"], r"SparseAdam takes sparse gradients"),
    "several losses": (None, ["--optimizer_type", "torch.optim.LBFGS"], r"torch\.optim\.LBFGS asks for the loss"),
    "optimizer": (None, ["--optimizer_type", "AdamW9bit"], r"AdamW9bit is not known; did you mean AdamW8bit\?"),
    "optimizer argument": (
        None, ["--optimizer_args", "weight_decai=0.1"], r"AdamW has no argument weight_decai; did you mean weight_decay"
    ),
    "schedule argument": (
        None, ["--lr_scheduler", "cosine", "--lr_scheduler_args", "num_cycle=2"],
        r"cosine has no argument num_cycle; did you mean num_cycles"
    ),
    "resume": (None, ["--resume", "none-state"], r"--resume.*none-state"),
}  # fmt: skip


TORCH_HAS_GPUS = not importlib.metadata.version("torch").endswith("+cpu")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(mistake, project):
    if mistake == "fp16 without a GPU" and TORCH_HAS_GPUS:
        pytest.skip("found when torch is there, whose version does not tell")
    prepare, arguments, expected = MISTAKES[mistake]
    if prepare:
        prepare(project)
    before = set(project.rglob("*"))
    result = run("--config_file", "lora.toml", *arguments, cwd=project)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert any(re.search(expected, line) for line in errors), result.stderr
    left = {path for path in project.rglob("*") if path.name != picture_index.NAME}  # which spares the next start
    assert left == before, "a mistake must leave nothing behind"


def test_a_dry_run_shows_its_tables_without_the_pictures_that_cannot_be_read(project):
    cut_picture(project)
    result = run("--config_file", "lora.toml", "--dry_run", cwd=project)
    assert result.returncode == 2 and re.search(r"^steps:$", result.stdout, re.MULTILINE)
    assert re.search(r"^train/2_yabin +1 +2", result.stdout, re.MULTILINE)
    assert re.search(r"^error: 2 pictures cannot be read: .*图 0\.png.*图 2\.png", result.stderr, re.MULTILINE)
    for path in (project / "train" / "2_yabin").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    result = run("--config_file", "lora.toml", "--dry_run", cwd=project)
    assert result.returncode == 2 and "error: 3 pictures cannot be read" in result.stderr


def test_all_mistakes_are_told_at_once(project):
    cut_picture(project)
    make_refiner(project)
    result = run("--config_file", "lora.toml", "--vae", "none.safetensors", "--train_batch_size", "0", cwd=project)
    assert result.returncode == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) >= 2, result.stderr


def test_mistakes_in_options_and_in_files_are_one_list_with_the_place_of_each(project):
    make_refiner(project)
    (project / "out").write_text("")
    write_line(
        project, 'train_batch_size = "many"\nnetwork_dim = 0\nvae = "none.ckpt"\nmetadata_thumbnail = "lora.toml"'
    )
    result = run("--config_file", "lora.toml", "--network_module", "networks.lorra", cwd=project)
    assert result.returncode == 2
    beginnings = [
        "lora.toml:6: train_batch_size must be a whole number, got 'many'",
        "lora.toml:8: --vae: there is no file or folder none.ckpt",
        "lora.toml:7: --network_dim must be at least 1, got 0",
        "lora.toml:4: --output_dir must be a folder",
        "lora.toml:1: --pretrained_model_name_or_path: model.safetensors is a Stable Diffusion XL refiner",
        "lora.toml:9: --metadata_thumbnail: lora.toml is no picture",
        "--network_module: there is no network networks.lorra here",
    ]
    errors = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(beginnings), result.stderr
    for error, beginning in zip(errors, beginnings, strict=True):
        assert error.startswith(beginning)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'train_data_dir = "trian"\nreg_data_dir = "reg"',
            [":7: --train_data_dir: there", ":8: --reg_data_dir: there"],
        ),
        ('dataset_config = "lora.toml"', [":1: pretrained_model_name_or_path is not known at the top", ":2: train_"]),
    ],
)
def test_folders_and_files_of_the_dataset_are_in_the_list_of_wrong_options(line, expected, project):
    text = (project / "lora.toml").read_text(encoding="utf-8")
    if "train_data_dir" in line:
        text = text.replace('train_data_dir = "train"\n', "\n")
    (project / "lora.toml").write_text(f"{text}train_batch_size = 0\n{line}\n", encoding="utf-8")
    result = run("--config_file", "lora.toml", cwd=project)
    assert result.returncode == 2
    for beginning in ("error: lora.toml:6: --train_batch_size must be", *(f"error: lora.toml{e}" for e in expected)):
        assert f"\n{beginning}" in f"\n{result.stderr}", result.stderr


def test_mistakes_and_warnings_found_after_reading_have_their_place(project):
    write_line(project, 'sample_every_n_steps = 5\nmetadata_thumbnail = "lora.toml"')
    result = run("--config_file", "lora.toml", cwd=project)
    assert "error: lora.toml:7: --metadata_thumbnail: lora.toml is no picture" in result.stderr


@pytest.mark.parametrize("value", [0, -1, "x", "a=b=c", ["x", "y"], True, "none.txt"])
def test_files_are_looked_at_whatever_is_wrong_with_an_option(value, project, monkeypatch):
    monkeypatch.chdir(project)
    good = {"pretrained_model_name_or_path": "model.safetensors", "train_data_dir": "train", "output_dir": "out"}
    for flag in flags_of(TrainNetworkOptions).values():
        with contextlib.suppress(Mismatch):
            options = TrainNetworkOptions(**good | {flag.name: convert(flag, value)})
            assert isinstance(problems_of_files(options), list)


def test_an_unknown_key_is_a_warning_for_a_drop_in(project):
    write_line(project, "network_dimm = 8")
    cut_model(project)
    result = run("--config_file", "lora.toml", "--network_dim", "4", "--network_dim", "8", cwd=project)
    assert re.search(r"^\d\d:\d\d:\d\d WARNING lora\.toml:6: network_dimm is", result.stderr, re.MULTILINE)
    assert "WARNING --network_dim is given twice on the command line: the last one counts" in result.stderr
    assert "cut off" in result.stderr


def test_a_folder_that_is_missing_from_two_datasets_is_told_once(project):
    write_dataset_config(project)
    result = run("--config_file", "lora.toml", "--dataset_config", "sets.toml", cwd=project)
    assert result.stderr.count("nowhere") == 1


def test_a_configuration_that_is_not_there_is_named(project):
    result = run("--config_file", "other.toml", cwd=project)
    assert result.returncode == 2 and "error: --config_file: there is no file other.toml" in result.stderr


def test_what_a_dataset_cannot_have_is_said(project):
    """Sizes that no bucket has, and batches that are never full; a rate that no optimizer learns with."""
    write_line(project, 'optimizer_type = "lion"\nunet_lr = 1.0\ntrain_batch_size = 1000000000\nenable_bucket = true')
    write_line(project, "min_bucket_reso = 64")
    result = run("--config_file", "lora.toml", "--resolution", "130", cwd=project)
    assert "resolution 130x130 is no multiple of 64 (bucket_reso_steps): no bucket is of this size" in result.stderr
    assert "a batch of 1000000000 pictures (train_batch_size) is never full: an epoch has 6 pictures" in result.stderr
    assert "the learning rate 1 is far too high for lion: 0.0001 is usual" in result.stderr


def test_an_output_folder_whose_pictures_would_be_trained_next_time_is_named(project):
    said = "--output_dir train/2_yabin is a folder of training pictures"
    for folder, is_named in (("train/2_yabin", True), ("train", False), ("out", False)):
        result = run("--config_file", "lora.toml", "--output_dir", folder, "--dry_run", cwd=project)
        assert (said in result.stderr.replace(os.sep, "/")) == is_named, result.stderr


def test_without_anything_that_is_needed_all_of_it_is_named(project):
    result = run("--nope", "--train_data_dir", "nowhere", cwd=project)
    assert result.returncode == 2
    for flag in ("--nope", "--resolution", "--output_dir", "--pretrained_model_name_or_path", "--train_data_dir"):
        assert f"error: {flag} " in result.stderr or f"error: {flag}:" in result.stderr, result.stderr


def test_an_output_folder_without_permission_is_named(project):
    if os.geteuid() == 0:
        project = project / "sub"  # root may write anywhere: a folder on a read-only file system stands in
        project.mkdir()
        result = run("--config_file", "../lora.toml", "--output_dir", "/proc/out", cwd=project)
    else:
        (project / "locked").mkdir(mode=0o500)
        result = run("--config_file", "lora.toml", "--output_dir", "locked/out", cwd=project)
    assert result.returncode == 2 and "error: --output_dir" in result.stderr


def test_a_folder_of_pictures_that_takes_no_caches_is_named_unless_they_are_all_there(project, monkeypatch):
    """Root may write to any folder, so that a read-only file system is played by what tries it."""
    folder = project / "train" / "2_yabin"
    (folder / "图 0_0064x0064_sd.npz").touch()
    monkeypatch.setattr(folders, "why_not_writable", lambda tried: "Read-only file system")
    options = TrainNetworkOptions(
        train_data_dir=str(project / "train"), resolution="64", cache_latents_to_disk=True, caption_extension=".txt"
    )
    scanned = scan_dataset(options)
    (problem,) = folders.cache_folder_problems(options, "sd", scanned)
    assert problem.startswith("--cache_latents_to_disk: 2 pictures in ") and "--cache_latents alone" in problem
    for index in (1, 2):
        (folder / f"图 {index}.npz").touch()
    assert folders.cache_folder_problems(options, "sd", scanned) == []
    with_text = replace(options, cache_text_encoder_outputs_to_disk=True)
    assert folders.cache_folder_problems(with_text, "sd", scanned) == []  # which keeps them in memory
    (problem,) = folders.cache_folder_problems(with_text, "sdxl", scanned)
    assert problem.startswith("--cache_text_encoder_outputs_to_disk: 3 pictures in ")


def test_whether_a_folder_takes_files_is_tried(tmp_path):
    assert why_not_writable(tmp_path) is None and not list(tmp_path.iterdir())
    assert why_not_writable("/proc" if os.name == "posix" else tmp_path / "none")


def test_help_needs_nothing_heavy_and_names_every_group():
    result = run("--help")
    assert result.returncode == 0
    assert "--network_dim" in result.stdout and "--pretrained_model_name_or_path" in result.stdout
