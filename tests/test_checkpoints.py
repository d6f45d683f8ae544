"""Single files, folders and separate VAEs give the very weights they were written from; diffusers reads them too."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from library.errors import UserError
from library.families.checkpoint_files import SafetensorsReader, Target, open_checkpoint
from library.families.checkpoints import LAYOUTS, Models, ldm_state_dict, open_models
from library.families.detect import inspect_checkpoint
from library.families.ldm_open_clip import open_clip_in_file, open_clip_part
from library.families.ldm_unet import eight_heads, heads_of_64, unet_config, unet_in_file, unet_naming, unet_part
from library.families.ldm_vae import vae_name_in_file
from library.options.groups import ModelOptions
from tests import tiny

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def load(path: Path, dtype: torch.dtype = FP32, vae: Path | None = None, **more: object):
    """Text encoders, VAE and U-Net, as training loads them."""
    options = ModelOptions(vae=str(vae) if vae else None, **more)
    models = open_models(inspect_checkpoint(str(path)), options)
    return tuple(part.loaded(Target(dtype)) for part in (*models.text_encoders, models.vae, models.unet))


def assert_same_weights(model, reference, dtype: torch.dtype | None = None) -> None:
    """Every weight and no other, bit by bit, of the reference's as it would be in `dtype`."""
    found, wanted = model.state_dict(), reference.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        expected = value if dtype is None else value.to(dtype)
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name


def rewritten(source: Path, target: Path, change) -> Path:
    """The file with another dictionary of weights."""
    save_file({name: value.contiguous() for name, value in change(load_file(source)).items()}, target)
    return target


@pytest.fixture(scope="module")
def without_vae(tmp_path_factory):
    return tiny.write_file(tmp_path_factory.mktemp("no vae") / "model.safetensors", with_vae=False)


@pytest.fixture(scope="module")
def file_of(tiny_file, tiny_sd2_file, tmp_path_factory):
    """The toy model of a kind as a single file."""
    sdxl_file = tiny.write_file(tmp_path_factory.mktemp("sdxl") / "model.safetensors", kind="sdxl")
    return {"sd1": tiny_file, "sd2": tiny_sd2_file, "sdxl": sdxl_file}.get


@pytest.fixture(scope="module")
def folder_of(tiny_folder, tmp_path_factory):
    """The toy model of a kind as a diffusers folder."""
    others = {k: tiny.write_folder(tmp_path_factory.mktemp(k) / "diffusers", k) for k in LAYOUTS if k != "sd1"}
    return ({"sd1": tiny_folder} | others).get


@pytest.fixture(scope="module")
def other_vae():
    """A VAE that is not the model's own."""
    torch.manual_seed(1)
    return AutoencoderKL.from_config(tiny.models().vae.config).eval()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_single_file_gives_the_weights_it_was_written_from(suffix, dtype, kind, tmp_path):
    path = tiny.write_file(tmp_path / f"模型{suffix}", dtype, kind=kind)
    unet, vae, text_encoders = tiny.models(kind)
    for model, reference in zip(load(path, dtype), (*text_encoders, vae, unet), strict=True):
        assert_same_weights(model, reference, dtype)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_a_file_that_is_read_without_mapping_gives_the_same_weights(dtype, kind, tmp_path):
    path = tiny.write_file(tmp_path / "model.safetensors", dtype, kind=kind)
    separate = tiny.write_file(tmp_path / "vae.safetensors", dtype)
    for vae in (None, separate):
        mapped, unmapped = (load(path, dtype, vae, disable_mmap_load_safetensors=off) for off in (False, True))
        for model, reference in zip(unmapped, mapped, strict=True):
            assert_same_weights(model, reference)
    separate.unlink()  # Windows does not delete what is mapped
    path.write_bytes(bytes(path.stat().st_size))
    assert all(parameter.any() for parameter in unmapped[-1].parameters() if parameter.ndim > 1)


def test_tensors_of_every_number_format_are_read_without_mapping(tmp_path):
    names = {dtype: name for name, dtype in SafetensorsReader.DTYPES.items()}
    weights = {name: torch.tensor([[0, 1, 3], [2, 0, 1]]).to(dtype) for dtype, name in names.items()}
    weights |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3, dtype=FP16)}
    save_file(weights, tmp_path / "a.safetensors")
    mapped, unmapped = (open_checkpoint(tmp_path / "a.safetensors", mapped) for mapped in (True, False))
    assert set(unmapped) == set(mapped) == set(weights)
    for name, value in weights.items():
        for found in (mapped[name], unmapped[name]):
            assert (found.dtype, found.shape) == (value.dtype, value.shape), name
            assert torch.equal(found.double(), value.double()), name


def test_weights_of_a_half_precision_file_are_widened_not_changed(tmp_path):
    loaded = load(tiny.write_file(tmp_path / "model.safetensors", FP16), FP32)[2]
    for name, value in tiny.models().unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_folder_gives_the_weights_it_was_written_from(kind, folder_of):
    unet, vae, text_encoders = tiny.models(kind)
    for model, reference in zip(load(folder_of(kind), BF16), (*text_encoders, vae, unet), strict=True):
        assert_same_weights(model, reference, BF16)


def test_fp16_variant_of_a_folder_is_used_where_it_is_the_only_one(tmp_path):
    folder = tiny.write_folder(tmp_path / "model")
    unet = tiny.models().unet
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    UNet2DConditionModel.from_config(unet.config).half().save_pretrained(tmp_path / "other", variant="fp16")
    name = "diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "other" / name).rename(folder / "unet" / name)
    assert load(folder)[2].dtype == FP32


def test_folder_without_a_part_is_a_mistake(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="has no text_encoder"):
        load(tmp_path)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_models_from_a_file_compute_what_the_originals_do(kind, file_of):
    """Equal weights are not all: heads, activation and normalisation are read off the file as well."""
    unet, vae, text_encoders = tiny.models(kind)
    *loaded_text_encoders, loaded_vae, loaded_unet = load(file_of(kind))
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    noisy, hidden = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, width, generator=generator)
    ids = torch.tensor([[49406, 320, 2368, *[49407] * 74]])
    added = {"text_embeds": torch.randn(1, 64, generator=generator), "time_ids": torch.full((1, 6), 64.0)}
    pairs = [
        (lambda model: model(noisy, 500, hidden, added_cond_kwargs=added).sample, loaded_unet, unet),
        (lambda model: model.decode(noisy).sample, loaded_vae, vae),
    ]
    for loaded, original in zip(loaded_text_encoders, text_encoders, strict=True):
        pairs.append((lambda model: model(ids).last_hidden_state, loaded, original))
        if original.config.hidden_act == "gelu" and kind == "sdxl":
            pairs.append((lambda model: model(ids).text_embeds, loaded, original))
    for run, loaded, original in pairs:
        with torch.no_grad():
            torch.testing.assert_close(run(loaded.eval()), run(original), rtol=1e-5, atol=2e-6)


def test_text_encoder_names_without_text_model_are_taken(tiny_file, tmp_path):
    path = rewritten(
        tiny_file, tmp_path / "flat.safetensors", lambda w: {k.replace(".text_model.", "."): v for k, v in w.items()}
    )
    assert_same_weights(load(path)[0], tiny.models().text_encoders[0])


def test_position_ids_and_other_extra_weights_are_passed_over(tiny_file, tmp_path):
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64),
        "model_ema.decay": torch.ones(()),
        "alphas_cumprod": torch.ones(1000),
    }
    text_encoder, _, unet = load(rewritten(tiny_file, tmp_path / "old.safetensors", lambda w: w | extra))
    assert_same_weights(unet, tiny.models().unet)
    ids = dict(text_encoder.named_buffers())
    assert [value.tolist() for name, value in ids.items() if "position_ids" in name] == [[list(range(77))]]


# --- what is missing or does not fit ---------------------------------------------------------------------------------

MISSING = {
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": "U-Net: 1 weights are missing",
    "model.diffusion_model.out.2.bias": "no Stable Diffusion U-Net: 1 weights are missing, e.g. .*out.2.bias",
    "model.diffusion_model.out.2.weight": "not complete: it has no model.diffusion_model.out.2.weight",
    "first_stage_model.post_quant_conv.weight": "no VAE: 1 weights are missing, e.g. .*post_quant_conv",
    "first_stage_model.decoder.conv_in.weight": "no VAE of its own; give one with --vae",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": "no CLIP text encoder: 1 weights are missing",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "not complete: .*token_embedding",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_weight_is_a_mistake_that_names_it(name, tiny_file, tmp_path):
    path = rewritten(tiny_file, tmp_path / "a.safetensors", lambda w: {k: v for k, v in w.items() if k != name})
    with pytest.raises(UserError, match=MISSING[name]):
        load(path)


def test_weight_of_another_size_is_a_mistake_that_names_it(tiny_file, tmp_path):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    path = rewritten(tiny_file, tmp_path / "a.safetensors", lambda w: w | {name: torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"other sizes: .*middle_block.*\(2, 2\) instead of \(64, 64, 3, 3\)"):
        load(path)


def test_pickle_may_hold_the_weights_without_a_state_dict_level(tmp_path):
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "a.ckpt")
    assert list(open_checkpoint(tmp_path / "a.ckpt")) == ["a"]


# --- the VAE ---------------------------------------------------------------------------------------------------------


def test_model_without_a_vae_needs_one_given(without_vae):
    with pytest.raises(UserError, match="no VAE of its own; give one with --vae"):
        load(without_vae)


def write_vae(kind: str, vae: AutoencoderKL, folder: Path) -> Path:
    """The VAE in one of the forms that --vae takes."""
    unet, _, text_encoders = tiny.models()
    weights = {name: value.contiguous() for name, value in ldm_state_dict(Models(unet, vae, text_encoders)).items()}
    prefix = "first_stage_model."
    prefixed = {name: value for name, value in weights.items() if name.startswith(prefix)}
    plain = {name.removeprefix(prefix): value for name, value in prefixed.items()}
    files = {"prefixed file": prefixed, "plain file": plain, "whole checkpoint": weights}
    if kind in files:
        save_file(files[kind], folder / "vae.safetensors")
        return folder / "vae.safetensors"
    if kind == "pickle":
        torch.save({"state_dict": plain}, folder / "vae.pt")
        return folder / "vae.pt"
    vae.save_pretrained(folder / "vae")
    return folder / "vae" if kind == "VAE folder" else folder


@pytest.mark.parametrize(
    "kind", ["prefixed file", "plain file", "whole checkpoint", "pickle", "VAE folder", "model folder"]
)
@pytest.mark.parametrize("model", ["with its own", "without one", "folder"])
def test_separate_vae_goes_before_the_models_own(kind, model, other_vae, tiny_file, without_vae, tiny_folder, tmp_path):
    path = {"with its own": tiny_file, "without one": without_vae, "folder": tiny_folder}[model]
    text_encoder, vae, unet = load(path, vae=write_vae(kind, other_vae, tmp_path))
    assert_same_weights(vae, other_vae)
    assert_same_weights(unet, tiny.models().unet)
    assert_same_weights(text_encoder, tiny.models().text_encoders[0])


def test_vae_file_with_diffusers_names_is_answered_with_its_folder(tiny_file, tiny_folder):
    with pytest.raises(UserError, match=r"diffusers names; give the folder that holds its config\.json"):
        load(tiny_file, vae=tiny_folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_folder_without_a_vae_is_a_mistake(tiny_file, tmp_path):
    with pytest.raises(UserError, match=r"--vae: the folder .* has no config\.json"):
        load(tiny_file, vae=tmp_path)


# --- diffusers as a reader of what we write --------------------------------------------------------------------------


def test_attention_of_the_vae_is_written_as_1x1_convolutions(tiny_file):
    """As the LDM code has it; diffusers reads both forms, others do not."""
    weights = load_file(tiny_file)
    for part in ("encoder", "decoder"):
        for name in ("q", "k", "v", "proj_out"):
            assert weights[f"first_stage_model.{part}.mid.attn_1.{name}.weight"].shape == (32, 32, 1, 1)
            assert weights[f"first_stage_model.{part}.mid.attn_1.{name}.bias"].shape == (32,)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_reads_our_unet(kind, file_of, folder_of):
    unet = UNet2DConditionModel.from_single_file(
        str(file_of(kind)), config=str(folder_of(kind) / "unet"), local_files_only=True
    )
    assert_same_weights(unet, tiny.models(kind).unet)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_reads_our_vae(kind, file_of, folder_of):
    vae = AutoencoderKL.from_single_file(str(file_of(kind)), config=str(folder_of(kind) / "vae"), local_files_only=True)
    assert_same_weights(vae, tiny.models(kind).vae)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_diffusers_reads_our_text_encoders(kind, file_of, folder_of):
    weights = single_file_utils.load_single_file_checkpoint(str(file_of(kind)), local_files_only=True)
    for part, reference in zip(LAYOUTS[kind].text_encoders, tiny.models(kind).text_encoders, strict=True):
        text_encoder = single_file_utils.create_diffusers_clip_model_from_ldm(
            part.model_class, weights, config=str(folder_of(kind)), subfolder=part.folder, local_files_only=True
        )
        assert_same_weights(text_encoder, reference)


# --- the names of full-size SD 1.5 -----------------------------------------------------------------------------------

UNET_NAMES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_1.weight": "time_embed.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "down_blocks.0.resnets.1.norm1.weight": "input_blocks.2.0.in_layers.0.weight",
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.1.resnets.0.time_emb_proj.bias": "input_blocks.4.0.emb_layers.1.bias",
    "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
    "mid_block.resnets.0.conv1.weight": "middle_block.0.in_layers.2.weight",
    "mid_block.attentions.0.transformer_blocks.0.norm1.weight": "middle_block.1.transformer_blocks.0.norm1.weight",
    "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
    "mid_block.resnets.1.norm2.bias": "middle_block.2.out_layers.0.bias",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    "up_blocks.3.attentions.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.weight": "out.2.weight",
}
VAE_NAMES = {
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down_blocks.2.downsamplers.0.conv.weight": "encoder.down.2.downsample.conv.weight",
    "encoder.mid_block.resnets.1.conv2.weight": "encoder.mid.block_2.conv2.weight",
    "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
    "encoder.conv_norm_out.weight": "encoder.norm_out.weight",
    "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.3.upsample.conv.weight",
    "decoder.up_blocks.3.resnets.2.norm1.bias": "decoder.up.0.block.2.norm1.bias",
    "quant_conv.weight": "quant_conv.weight",
}


@pytest.fixture(scope="module")
def full_size_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


@pytest.fixture(scope="module")
def full_size_vae():
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )


def numbered(names: list[str], prefix: str) -> dict[str, torch.Tensor]:
    """A checkpoint whose weights are their own numbers."""
    return {prefix + name: torch.full((1, 1, 1, 1), float(number)) for number, name in enumerate(names)}


def test_unet_names_are_those_of_the_ldm_layout(full_size_unet):
    name_in_file = unet_naming(full_size_unet)
    names = [name_in_file(name) for name in full_size_unet.state_dict()]
    assert len(names) == len(set(names)) == 686
    assert {name: name_in_file(name) for name in UNET_NAMES} == UNET_NAMES
    assert full_size_unet.state_dict().keys() >= UNET_NAMES.keys()


def test_diffusers_converts_our_unet_names_back(full_size_unet):
    ours = list(full_size_unet.state_dict())
    checkpoint = numbered([unet_naming(full_size_unet)(name) for name in ours], "model.diffusion_model.")
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, dict(full_size_unet.config))
    assert {name: value.item() for name, value in converted.items()} == {name: i for i, name in enumerate(ours)}


def test_vae_names_are_those_of_the_ldm_layout(full_size_vae):
    names = [vae_name_in_file(name, num_blocks=4) for name in full_size_vae.state_dict()]
    assert len(names) == len(set(names)) == 248
    assert {name: vae_name_in_file(name, num_blocks=4) for name in VAE_NAMES} == VAE_NAMES
    assert full_size_vae.state_dict().keys() >= VAE_NAMES.keys()


def test_diffusers_converts_our_vae_names_back(full_size_vae):
    ours = list(full_size_vae.state_dict())
    checkpoint = numbered([vae_name_in_file(name, num_blocks=4) for name in ours], "first_stage_model.")
    converted = single_file_utils.convert_ldm_vae_checkpoint(checkpoint, dict(full_size_vae.config))
    assert {name: value.item() for name, value in converted.items()} == {name: i for i, name in enumerate(ours)}


def test_a_pickled_inpainting_model_is_named_when_its_shapes_are_seen(tmp_path):
    weights = dict(ldm_state_dict(tiny.models()))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    weights[name] = torch.zeros(weights[name].shape[0], 9, 3, 3)
    with pytest.raises(UserError, match="inpainting"):
        unet_part(weights, eight_heads)


def test_a_pickle_of_something_else_has_no_unet(tmp_path):
    torch.save([1, 2], tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="no Stable Diffusion U-Net"):
        unet_part(open_checkpoint(tmp_path / "x.ckpt"), eight_heads)


def test_a_safetensors_file_whose_offsets_are_wrong_is_refused_in_a_sentence(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path / "x.safetensors")


# --- full-size SD 2.1 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip():
    """The text encoder of SD 2.x in full size, without memory for its weights."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_act="gelu", projection_dim=1024, **config))


def test_open_clip_file_has_24_layers_and_the_model_the_first_23(open_clip):
    weights = open_clip_in_file(open_clip)
    layers = {name.split(".")[4] for name in weights if ".resblocks." in name}
    assert layers == {str(number) for number in range(24)}
    assert weights["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    loaded = open_clip_part(weights).loaded(Target(FP16, torch.device("meta")))
    assert loaded.state_dict().keys() == open_clip.state_dict().keys()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    assert [getattr(loaded.config, name) for name in names] == [1024, 4096, 23, 16, "gelu"]


def test_open_clip_file_without_its_last_layer_gives_the_same_model(open_clip):
    weights = {name: value for name, value in open_clip_in_file(open_clip).items() if ".resblocks.23." not in name}
    assert open_clip_part(weights).loaded(Target(FP16, torch.device("meta"))).config.num_hidden_layers == 23


def test_layer_23_of_an_open_clip_file_is_never_read(open_clip):
    weights = open_clip_in_file(open_clip)
    del weights["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"]
    assert open_clip_part(weights).loaded(Target(FP16, torch.device("meta"))).config.num_hidden_layers == 23


def test_missing_third_of_open_clip_is_a_mistake_that_names_it(tiny_sd2_file, tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"
    path = rewritten(tiny_sd2_file, tmp_path / "a.safetensors", lambda w: {k: v for k, v in w.items() if k != name})
    with pytest.raises(
        UserError, match=r"no OpenCLIP text encoder: 3 weights are missing, e\.g\. .*in_proj_bias\.[qkv]$"
    ):
        load(path)


@pytest.mark.parametrize("linear", [True, False])
def test_unet_config_of_sd2_is_read_off_its_shapes(linear):
    wanted = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=linear)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**wanted)
    config = unet_config(unet_in_file(unet), heads_of_64)
    assert {name: config[name] for name in wanted} == wanted
    assert config["block_out_channels"] == (320, 640, 1280, 1280) and config["layers_per_block"] == 2
