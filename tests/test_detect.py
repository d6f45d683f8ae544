"""What a checkpoint is, is read from its header: no torch, no code of a pickle, a sentence where there is none."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from library.errors import UserError
from library.families import FAMILIES, family_of_kind
from library.families.checkpoints import open_checkpoint
from library.families.detect import inspect_checkpoint
from library.families.kinds import KINDS, PIPELINE_KINDS, kind_of_shapes
from tests import tiny

ROOT = Path(__file__).parents[1]
UNET = "model.diffusion_model."
SD1_TEXT = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
VAE_ENDS = ["decoder.conv_in.weight", "encoder.conv_in.weight"]
FIRST_CONVOLUTION = {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}


def ldm(*names: str, in_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """A whole checkpoint in the LDM layout with these weights beside U-Net and VAE."""
    shapes = {f"{UNET}input_blocks.0.0.weight": (8, in_channels, 3, 3), f"{UNET}out.2.weight": (4, 8, 3, 3)}
    return shapes | {name: (2, 2) for name in [*names, *(f"first_stage_model.{name}" for name in VAE_ENDS)]}


def named(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: (2, 2) for name in names}


HEADERS = [
    ("sd1", ldm(SD1_TEXT)),
    ("sd1", ldm("cond_stage_model.transformer.embeddings.token_embedding.weight")),
    ("sd1_inpainting", ldm(SD1_TEXT, in_channels=9)),
    ("sd2", ldm("cond_stage_model.model.token_embedding.weight")),
    ("sd2_inpainting", ldm("cond_stage_model.model.token_embedding.weight", in_channels=9)),
    ("sdxl", ldm("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.token_embedding.weight")),
    ("sdxl_refiner", ldm("conditioner.embedders.0.model.token_embedding.weight")),
    (
        "sdxl_inpainting",
        ldm("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.token_embedding.weight")
        | {f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)},
    ),
    ("sd3", named(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", *VAE_ENDS)),
    ("flux", named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")),
    ("flux", named(f"{UNET}double_blocks.0.img_attn.qkv.weight")),
    ("lumina2", named(f"{UNET}context_refiner.0.attention.qkv.weight")),
    ("chroma", named("distilled_guidance_layer.layers.0.in_layer.weight", "double_blocks.0.img_attn.qkv.weight")),
    ("hunyuan", named("txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.qkv.weight")),
    ("hunyuan_dit", named("mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight")),
    ("aura_flow", named("model.double_layers.0.attn.w1q.weight")),
    ("cascade", named("clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight")),
    ("qwen_image", named("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    ("cosmos", named("net.blocks.0.adaln_modulation_self_attn.1.weight", "net.blocks.0.mlp.layer1.weight")),
    ("wan", named("blocks.0.self_attn.norm_k.weight", "head.modulation")),
    ("pixart", named("scale_shift_table", "adaln_single.linear.weight")),
    ("unet_only", FIRST_CONVOLUTION),
    ("unet_only", named("down_blocks.0.attentions.0.proj_in.weight", "conv_in.weight")),
    ("vae", named(*VAE_ENDS)),
    ("vae", named(*(f"first_stage_model.{name}" for name in VAE_ENDS))),
    ("adapter", named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight")),
    ("adapter", named("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a")),
    ("adapter", named("transformer.double_blocks.0.img_attn.proj.lora_A.weight")),
    ("embedding", named("emb_params")),
    ("text_encoder", named("text_model.embeddings.token_embedding.weight")),
    ("text_encoder", named("shared.weight", "encoder.block.0.layer.0.SelfAttention.k.weight")),
    ("unknown", named("a", "b.c")),
    ("unknown", {}),
]


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}, path)
    return path


def write_model_folder(folder: Path, pipeline: str, unet: dict | None = None) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
    if unet is not None:
        (folder / "unet" / "config.json").write_text(json.dumps(unet), encoding="utf-8")
    return folder


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        inspect_checkpoint(str(path))
    assert "--pretrained_model_name_or_path" in str(caught.value)
    return str(caught.value)


# --- kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shapes"), HEADERS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(HEADERS)])
def test_kind_of_a_file_is_read_from_its_header(kind, shapes, tmp_path):
    info = inspect_checkpoint(str(write_header(tmp_path / "model.safetensors", shapes)))
    assert (info.kind, info.is_folder, info.description) == (kind, False, KINDS[kind].description)


def test_every_kind_has_a_header_here():
    assert {kind for kind, _ in HEADERS} == set(KINDS)


def test_metadata_of_a_file_is_not_taken_for_a_weight(tmp_path):
    save_file({"a": np.zeros(1, np.uint8)}, tmp_path / "a.safetensors", {"emb_params": "1"})
    assert inspect_checkpoint(str(tmp_path / "a.safetensors")).kind == "unknown"


@pytest.mark.parametrize("pipeline", PIPELINE_KINDS)
def test_kind_of_a_folder_is_that_of_its_pipeline(pipeline, tmp_path):
    info = inspect_checkpoint(str(write_model_folder(tmp_path / "model", pipeline)))
    assert (info.kind, info.is_folder) == (PIPELINE_KINDS[pipeline], True)
    assert info.kind in KINDS


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"in_channels": 4, "cross_attention_dim": 768}, "sd1"),
        ({"in_channels": 9, "cross_attention_dim": 768}, "sd1_inpainting"),
        ({"in_channels": 4, "cross_attention_dim": 1024}, "sd2"),
        ({"in_channels": 9, "cross_attention_dim": 1024}, "sd2_inpainting"),
    ],
)
def test_unet_config_tells_models_of_one_pipeline_apart(config, kind, tmp_path):
    assert inspect_checkpoint(str(write_model_folder(tmp_path / "m", "StableDiffusionPipeline", config))).kind == kind


def test_pipeline_that_is_not_known_is_an_unknown_kind(tmp_path):
    assert inspect_checkpoint(str(write_model_folder(tmp_path / "m", "SomethingNewPipeline"))).kind == "unknown"


def test_inpainting_pipeline_of_sd2_is_known_by_its_unet(tmp_path):
    folder = write_model_folder(tmp_path / "m", "StableDiffusionInpaintPipeline", {"cross_attention_dim": 1024})
    assert inspect_checkpoint(str(folder)).kind == "sd2_inpainting"


@pytest.mark.parametrize("kind", tiny.TOYS)
def test_the_tiny_models_are_what_they_are_named(kind, tmp_path):
    paths = tiny.write_folder(tmp_path / "folder", kind), tiny.write_file(tmp_path / "file.safetensors", kind=kind)
    assert [inspect_checkpoint(str(path)).kind for path in paths] == [kind, kind]


def test_pickled_checkpoint_is_known_by_its_names(tmp_path):
    assert inspect_checkpoint(str(tiny.write_file(tmp_path / "tiny.ckpt"))).kind == "sd1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_trained_or_refused_with_its_name_and_what_can_be_done(kind, tmp_path):
    shapes = next(shapes for of, shapes in HEADERS if of == kind)
    info = inspect_checkpoint(str(write_header(tmp_path / "a.safetensors", shapes)))
    if any(kind in row.kinds for row in FAMILIES.values()):
        assert kind in FAMILIES[family_of_kind(info)].kinds
        return
    with pytest.raises(UserError) as caught:
        family_of_kind(info)
    sentence = str(caught.value)
    assert f"a.safetensors is a {KINDS[kind].description}; this version trains a Stable Diffusion 1.x model" in sentence
    assert sentence.endswith(KINDS[kind].advice)


def test_the_script_of_one_family_names_the_script_for_all(tmp_path):
    info = inspect_checkpoint(str(write_header(tmp_path / "a.safetensors", ldm(SD1_TEXT))))
    with pytest.raises(UserError, match=r"this script trains a Stable Diffusion XL base model; use train_network\.py$"):
        family_of_kind(info, "sdxl")


# --- pickles that do more than hold weights --------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_pickle_is_run(tmp_path):
    path, sprung = tmp_path / "model.ckpt", tmp_path / "sprung"
    weights = {name: torch.zeros(1) for name in ldm(SD1_TEXT)}
    torch.save({"state_dict": weights, "callbacks": Trap(sprung)}, path)
    assert inspect_checkpoint(str(path)).kind == "sd1"
    with pytest.raises(UserError, match=r"model\.ckpt cannot be loaded safely.*get the \.safetensors version"):
        open_checkpoint(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap itself does not work"


def test_checkpoint_that_is_no_torch_archive_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "cannot" not in refusal(path) and "get the .safetensors version" in refusal(path)
    path.write_bytes(b"")
    assert "get the .safetensors version" in refusal(path)


def test_pickled_checkpoint_that_was_cut_off_is_refused(tmp_path):
    path = tiny.write_file(tmp_path / "tiny.ckpt")
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cut off" in refusal(path)


def test_archive_without_a_pickle_or_with_a_broken_one_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "no torch checkpoint" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\xff\xfe not a pickle")
    assert "broken" in refusal(path)


# --- files that are not whole ----------------------------------------------------------------------------------------


def test_safetensors_file_cut_off_anywhere_is_refused(tmp_path):
    path = write_header(tmp_path / "model.safetensors", ldm(SD1_TEXT))
    data = path.read_bytes()
    end_of_header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 5, 8, 9, end_of_header // 2, end_of_header - 1, end_of_header, len(data) - 1):
        path.write_bytes(data[:length])
        assert "cut off" in refusal(path), length
        assert str(length) in refusal(path)


BROKEN_HEADERS = {
    "empty": b"",
    "no json": b"hello, this is a web page",
    "cut json": b'{"a": {"dtype": "F32"',
    "list": b"[]",
    "number": b"5",
    "entry is a number": b'{"a": 5}',
    "entry without offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "one offset": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    "offsets in words": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
    "no utf-8": b'{"\xff\xff": {}}',
    "nested deeply": b"[" * 200_000,
}


@pytest.mark.parametrize("header", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_broken_header_is_refused(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "broken safetensors header" in refusal(path)


@pytest.mark.parametrize("size", [100_000_001, 2**40, 2**64 - 1])
def test_header_longer_than_the_file_is_not_read(size, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b"{}" * 10)
    assert "not a safetensors file" in refusal(path)


# --- paths that lead nowhere -----------------------------------------------------------------------------------------


def test_missing_file_is_named_with_its_neighbours(tmp_path):
    for name in ("b.safetensors", "a.ckpt", "notes.txt"):
        (tmp_path / name).touch()
    sentence = refusal(tmp_path / "c.safetensors")
    assert "c.safetensors does not exist" in sentence
    assert "has a.ckpt, b.safetensors" in sentence and "notes.txt" not in sentence


def test_missing_folder_is_named(tmp_path):
    assert f"there is no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone" / "a.safetensors")


@pytest.mark.parametrize("owner_is_a_folder", [False, True])
@pytest.mark.parametrize("name", ["runwayml/stable-diffusion-v1-5", "SG161222/Realistic_Vision_V5.1_noVAE"])
def test_name_on_the_hub_is_answered_with_nothing_is_downloaded(name, owner_is_a_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if owner_is_a_folder:
        Path(name).parent.mkdir()
    assert "nothing is downloaded" in refusal(name)


def test_relative_path_of_a_missing_file_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "(there is no folder models)" in refusal("models/a.safetensors")
    assert "downloaded" not in refusal("models/a.safetensors")


def test_file_of_another_type_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf is not a checkpoint; give a .safetensors or .ckpt file" in refusal(tmp_path / "model.gguf")


def test_folder_without_model_index_is_refused(tmp_path):
    assert "it has no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_broken_model_index_is_refused(text, tmp_path):
    (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "model_index.json is broken" in refusal(tmp_path)


def test_the_flag_at_fault_is_named(tmp_path):
    with pytest.raises(UserError, match="^--vae: "):
        inspect_checkpoint(str(tmp_path / "vae.safetensors"), "--vae")


# --- no torch --------------------------------------------------------------------------------------------------------


def test_everything_before_training_is_imported_without_torch():
    code = (
        "import sys, train_network, library.preflight, library.families.detect\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'accelerate') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_names_of_a_pickle_need_no_shapes():
    assert kind_of_shapes(dict.fromkeys(ldm(SD1_TEXT, in_channels=9))) == "sd1"
