"""The whole script on real files: what it writes, that training trains, that resuming repeats it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.errors import UserError
from tests import tiny
from tests.results import curves, metadata_of, scalars, weights_equal
from train_network import train


def test_a_run_writes_exactly_these_files(tiny_file, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    output = tmp_path / "输出 folder"
    train(
        tiny.arguments(
            tiny_file, pictures, output, max_train_epochs=3, train_batch_size=2, save_every_n_epochs=1,
            save_last_n_epochs=1, save_state=True, sample_prompts=prompts, sample_every_n_epochs=2,
            sample_at_first=True, before_after=True,
        )
    )  # fmt: skip
    names = sorted(path.name for path in output.iterdir())
    assert names == [
        "before_after.png",
        "lora-000002-state",
        "lora-000002.safetensors",
        "lora-report.html",
        "lora-run.json",
        "lora-state",
        "lora.safetensors",
        "sample",
    ]
    samples = sorted(path.name for path in (output / "sample").iterdir())
    assert [name[:16] for name in samples] == ["lora_e000000_00_", "lora_e000002_00_"]
    assert all(name.endswith("_7.png") for name in samples)
    state = sorted(path.name for path in (output / "lora-state").iterdir())
    assert state == ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "train_state.json"]
    facts = json.loads((output / "lora-state" / "train_state.json").read_text())
    assert (facts["current_epoch"], facts["current_step"]) == (3, 12)


def test_metadata_has_every_field_of_kohyas(tiny_file, pictures, tmp_path):
    golden = json.loads((Path(__file__).parent / "data" / "sample_lora_metadata_sd15.json").read_text())
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", network_args=["conv_dim=2"], save_precision="fp16", clip_skip=2
        )
    )
    metadata = metadata_of(tmp_path / "out" / "lora.safetensors")
    assert set(golden) - set(metadata) == set()
    assert set(metadata) - set(golden) == {"modelspec.encoder_layer"}
    assert metadata["ss_network_args"] == json.dumps({"conv_dim": "2", "dropout": None})
    assert metadata["ss_tag_frequency"] == json.dumps(
        {"2_cat": {"a cat": 4, "number 0": 1, "number 1": 1, "number 2": 1, "number 3": 1}}
    )
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 4}}
    assert metadata["ss_steps"] == "8" and metadata["ss_epoch"] == "1" and metadata["ss_unet_lr"] == "0.001"
    assert metadata["ss_seed"] == "1" and metadata["ss_network_alpha"] == "1" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "out" / "lora.safetensors").values())


SD2_METADATA = {
    False: ("sd_v2", "stable-diffusion-v2-512/lora", "epsilon"),
    True: ("sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
}


@pytest.mark.parametrize("v_parameterization", SD2_METADATA)
def test_sd2_trains_and_its_file_says_what_it_is_for(v_parameterization, tiny_sd2_file, pictures, tmp_path):
    train(
        tiny.arguments(
            tiny_sd2_file, pictures, tmp_path / "out", v2=True, v_parameterization=v_parameterization,
            max_train_epochs=None, max_train_steps=2, max_token_length=150, gradient_checkpointing=True,
        )
    )  # fmt: skip
    path = tmp_path / "out" / "lora.safetensors"
    metadata = metadata_of(path)
    names = ("ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(metadata[name] for name in names) == SD2_METADATA[v_parameterization]
    assert (metadata["ss_v2"], metadata["ss_steps"], metadata["modelspec.resolution"]) == ("True", "2", "96x96")
    weights = load_file(path)
    assert weights["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].ndim == 2
    for part in ("lora_te_", "lora_unet_"):
        assert any(value.any() for name, value in weights.items() if name.startswith(part) and "lora_up" in name), part


def test_wrong_v2_flag_is_said_and_the_model_is_trained_as_what_it_is(tiny_file, pictures, tmp_path, capsys):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", v2=True, max_train_epochs=None, max_train_steps=1))
    assert capsys.readouterr().err.count("--v2 is given") == 1
    assert metadata_of(tmp_path / "out" / "lora.safetensors")["ss_v2"] == "False"


@pytest.mark.parametrize("frozen", [True, False])
def test_weighted_captions_train_something_else_than_their_text(frozen, tiny_folder, pictures, tmp_path):
    for path in (pictures / "2_cat").glob("*.txt"):
        path.write_text("a (cat:1.4), [number]", encoding="utf-8")
    common = dict(max_train_epochs=None, max_train_steps=2, network_train_unet_only=frozen)
    for name, weighted in (("text", False), ("weighted", True)):
        train(tiny.arguments(tiny_folder, pictures, tmp_path / name, weighted_captions=weighted, **common))
    files = [tmp_path / name / "lora.safetensors" for name in ("text", "weighted")]
    assert not weights_equal(*files)


def test_no_metadata_leaves_the_few_fields_that_loaders_need(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", no_metadata=True))
    names = {name for name in metadata_of(tmp_path / "out" / "lora.safetensors") if name.startswith("ss_")}
    assert names == {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}


def test_the_same_seed_gives_the_same_file(tiny_file, pictures, tmp_path):
    for name in ("one", "two"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / name))
    assert weights_equal(tmp_path / "one" / "lora.safetensors", tmp_path / "two" / "lora.safetensors")


RESUME_VARIANTS = {
    "epoch end": dict(save_every_n_epochs=1, state="lora-000001-state"),
    "mid-epoch": dict(save_every_n_steps=3, state="lora-step00000003-state"),
    "accumulation": dict(save_every_n_steps=1, gradient_accumulation_steps=3, state="lora-step00000002-state"),
    "dropouts": dict(
        save_every_n_steps=5, state="lora-step00000005-state", network_dropout=0.1, caption_dropout_rate=0.3,
        network_args=["rank_dropout=0.2", "module_dropout=0.2"], gradient_checkpointing=True,
    ),
    "8 bit": dict(save_every_n_steps=3, state="lora-step00000003-state", optimizer_type="AdamW8bit"),
    "workers": dict(
        save_every_n_steps=3, state="lora-step00000003-state", cache_latents=False, color_aug=True,
        max_data_loader_n_workers=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", RESUME_VARIANTS)
def test_a_resumed_run_ends_in_the_same_bits(variant, tiny_folder, pictures, tmp_path):
    options = dict(RESUME_VARIANTS[variant])
    state = options.pop("state")
    common = dict(max_train_epochs=2, lr_scheduler="cosine", lr_warmup_steps=2, shuffle_caption=True, flip_aug=True)
    whole = tmp_path / "whole"
    train(tiny.arguments(tiny_folder, pictures, whole, save_state=True, **common, **options))
    resumed = tmp_path / "resumed"
    train(tiny.arguments(tiny_folder, pictures, resumed, resume=whole / state, **common, **options))
    assert weights_equal(whole / "lora.safetensors", resumed / "lora.safetensors")


@pytest.mark.parametrize("num_steps", [8, 3])
def test_a_finished_run_goes_on_as_if_it_had_been_longer(num_steps, tiny_folder, pictures, tmp_path):
    common = dict(max_train_epochs=None, shuffle_caption=True, flip_aug=True)
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "long", max_train_steps=10, **common))
    short = tmp_path / "short"
    train(
        tiny.arguments(tiny_folder, pictures, short, max_train_steps=num_steps, save_state_on_train_end=True, **common)
    )
    rest = tmp_path / "rest"
    train(tiny.arguments(tiny_folder, pictures, rest, max_train_steps=10, resume=short / "lora-state", **common))
    assert weights_equal(tmp_path / "long" / "lora.safetensors", rest / "lora.safetensors")


def test_a_state_of_another_optimizer_or_rank_is_a_mistake_and_its_rate_goes_on(tiny_file, pictures, tmp_path, capsys):
    first = tmp_path / "first"
    train(tiny.arguments(tiny_file, pictures, first, max_train_epochs=None, max_train_steps=2, save_state=True))
    later = dict(resume=first / "lora-state", max_train_epochs=None, max_train_steps=3)
    for given, sentence in (
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1},
            "does not fit this run: it is of --optimizer_type AdamW, and this run has Prodigy",
        ),
        ({"network_dim": 8}, "it has rank 4, but --network_dim is 8; give --network_dim 4"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **later, **given))
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **later, learning_rate=0.1))
    assert "training goes on at the state's learning rate, 0.001, not at 0.1" in capsys.readouterr().err


def test_learning_rate_zero_changes_nothing(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", learning_rate=1e-30, optimizer_args=["weight_decay=0"]))
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    ups = [value for name, value in weights.items() if name.endswith("lora_up.weight")]
    assert ups and all(value.abs().max() < 1e-25 for value in ups)


def test_a_part_with_learning_rate_zero_is_not_trained(tiny_file, pictures, tmp_path, capsys):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", text_encoder_lr=0))
    assert "text encoder" in (table := capsys.readouterr().out) and "not trained" in table
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    moved = {name.split("_")[1] for name, value in weights.items() if "lora_up" in name and value.any()}
    assert moved == {"unet"}


def test_unet_only_saves_no_text_encoder_keys(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", network_train_unet_only=True))
    assert not [name for name in load_file(tmp_path / "out" / "lora.safetensors") if name.startswith("lora_te")]


def test_gradient_checkpointing_and_accumulated_batches_change_no_result(tiny_folder, pictures, tmp_path):
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "plain"))
    plain = load_file(tmp_path / "plain" / "lora.safetensors")
    for in_main_memory in (False, True):
        train(
            tiny.arguments(
                tiny_folder, pictures, tmp_path / "saver", gradient_checkpointing=True,
                cpu_offload_checkpointing=in_main_memory,
            )
        )  # fmt: skip
        saver = load_file(tmp_path / "saver" / "lora.safetensors")
        for name, value in plain.items():
            torch.testing.assert_close(saver[name], value, rtol=1e-4, atol=1e-6)


def test_latents_on_disk_give_the_same_training_as_in_memory(tiny_folder, pictures, tmp_path):
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "memory", flip_aug=True))
    runs = {"writes": "npz", "reads": "npz", "takes over": "packed", "reads packs": "packed"}
    for name, kind in runs.items():
        more = dict(flip_aug=True, cache_latents_to_disk=True, latent_cache=kind)
        train(tiny.arguments(tiny_folder, pictures, tmp_path / name, **more))
    assert len(list((pictures / "2_cat").glob("*_sd.npz"))) == 4
    memory, *disk = (tmp_path / name / "lora.safetensors" for name in ("memory", *runs))
    assert all(weights_equal(memory, path) for path in disk)


def test_network_weights_are_where_training_starts(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "first"))
    first = tmp_path / "first" / "lora.safetensors"
    train(tiny.arguments(tiny_file, pictures, tmp_path / "second", network_weights=first, learning_rate=1e-30))
    before, after = load_file(first), load_file(tmp_path / "second" / "lora.safetensors")
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-6) for name in before)


def test_regularisation_pictures_are_balanced_and_weighted(tiny_file, pictures, tmp_path):
    tiny.write_pictures(tmp_path / "reg", "1_animal", count=2)
    arguments = tiny.arguments(
        tiny_file, pictures, tmp_path / "out", reg_data_dir=tmp_path / "reg", prior_loss_weight=0.5, max_train_epochs=1
    )
    train(arguments)
    metadata = metadata_of(tmp_path / "out" / "lora.safetensors")
    assert metadata["ss_steps"] == "16"  # 4 pictures x 2 repeats, and as many regularisation pictures
    assert metadata["ss_num_reg_images"] == "2"
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 2}}


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_other_file_formats_hold_the_same_weights(extension, tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", save_model_as=extension))
    weights = torch.load(tmp_path / "out" / f"lora.{extension}", weights_only=True)
    assert "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight" in weights


def test_bf16_and_long_captions_and_clip_skip_train(tiny_file, pictures, tmp_path):
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", mixed_precision="bf16", max_token_length=225, clip_skip=2,
            optimizer_type="AdamW8bit", lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2,
            min_snr_gamma=5, noise_offset=0.1, save_precision="bf16",
        )
    )  # fmt: skip
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    assert all(value.isfinite().all() and value.dtype == torch.bfloat16 for value in weights.values())


def test_tensorboard_gets_kohyas_tags(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", logging_dir=tmp_path / "logs", log_prefix="x_"))
    assert [folder.name[:2] for folder in (tmp_path / "logs").iterdir()] == ["x_"]
    logged = curves(tmp_path / "logs")
    assert logged.keys() == {"loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet"}
    assert logged["lr/unet"][-1][1] == pytest.approx(0.001)
    assert [step for step, _ in logged["loss/current"]] == list(range(1, 9))


def test_no_layer_changes_more_than_scale_weight_norms_allows(tiny_file, pictures, tmp_path):
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "out", scale_weight_norms=0.02, learning_rate=0.01, network_alpha=2,
            network_args=["conv_dim=2", "conv_alpha=1"], logging_dir=tmp_path / "logs", gradient_accumulation_steps=2,
        )
    )  # fmt: skip
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    norms = []
    for name in [name.removesuffix(".alpha") for name in weights if name.endswith(".alpha")]:
        down, up = weights[f"{name}.lora_down.weight"].flatten(1), weights[f"{name}.lora_up.weight"].flatten(1)
        norms.append((up @ down * weights[f"{name}.alpha"] / len(down)).norm().item())
    assert max(norms) == pytest.approx(0.02, rel=1e-4)  # some are at the limit, none above
    logged = scalars(tmp_path / "logs")
    num_scaled, largest, mean = (
        logged[tag] for tag in ("max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm")
    )
    assert len(num_scaled) == len(logged["loss/current"]) and 0 < max(num_scaled) <= len(norms)
    assert largest[-1] == pytest.approx(max(norms), rel=1e-4)
    assert mean[-1] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_blocks_train_at_their_own_rates_and_those_of_weight_0_have_no_keys(tiny_file, pictures, tmp_path, capsys):
    arguments = ["down_lr_weight=0.5", "mid_lr_weight=0", "up_lr_weight=0,0,0,0.25,0.5,1"]
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", network_args=arguments, logging_dir=tmp_path / "logs"))
    assert "0.00025 to 0.001" in capsys.readouterr().out
    rates = {tag: values[-1] for tag, values in scalars(tmp_path / "logs").items() if tag.startswith("lr/")}
    assert rates == pytest.approx({
        "lr/textencoder": 1e-3, "lr/unet_block1": 5e-4, "lr/unet_block2": 5e-4,
        "lr/unet_block16": 2.5e-4, "lr/unet_block17": 5e-4, "lr/unet_block18": 1e-3,
    })  # fmt: skip
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    assert not [name for name in weights if "mid_block" in name]
    first = {block: f"lora_unet_up_blocks_1_attentions_{block}_proj_in.lora_up.weight" for block in (0, 2)}
    assert weights[first[2]].abs().mean() > 2 * weights[first[0]].abs().mean() > 0  # Adam moves in steps of the rate


def test_training_goes_on_from_a_file_with_its_ranks_and_on_top_of_another(tiny_file, pictures, tmp_path):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "first", network_dim=3, network_args=["conv_dim=2"]))
    first = tmp_path / "first" / "lora.safetensors"
    train(
        tiny.arguments(
            tiny_file, pictures, tmp_path / "second", network_dim=None, network_weights=first, dim_from_weights=True,
            base_weights=[first, first], base_weights_multiplier=[0.5], learning_rate=1e-30,
        )
    )  # fmt: skip
    before, after = load_file(first), load_file(tmp_path / "second" / "lora.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=1e-6) for name in before)


def test_what_is_trained_and_how_many_steps_is_said(tiny_file, pictures, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", text_encoder_lr=1e-5, caption_extension=".caption"))
    table = capsys.readouterr().out
    assert "text encoder" in table and "1e-05" in table and "U-Net" in table and "0.001" in table


def test_a_weight_and_a_warmup_without_effect_on_this_dataset_are_said(tiny_file, pictures, tmp_path, capsys):
    idle = dict(prior_loss_weight=0.5, lr_scheduler="cosine", lr_warmup_steps=500)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **idle))
    said = capsys.readouterr().err
    assert "--prior_loss_weight has no effect: there are no regularisation pictures" in said
    assert "--lr_warmup_steps 500 is not below all steps, 8" in said


@pytest.mark.parametrize(("flag", "value"), [("initial_epoch", 2), ("initial_step", 8)])
def test_a_start_behind_the_end_is_a_mistake_of_the_flag_that_was_given(flag, value, tiny_file, pictures, tmp_path):
    with pytest.raises(UserError, match=f"--{flag} {value} begins after the last step, 8"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **{flag: value}))


def test_vanished_pictures_are_named(tiny_file, pictures, tmp_path):
    (pictures / "2_cat" / "picture 2.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="picture 2.png"):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nan_latents_are_named_by_picture(tiny_file, pictures, tmp_path):
    weights = load_file(tiny_file)
    weights["first_stage_model.quant_conv.bias"].fill_(float("nan"))
    broken = tmp_path / "broken.safetensors"
    save_file(weights, broken)
    with pytest.raises(UserError, match="NaN.*picture 0.png.*no_half_vae"):
        train(tiny.arguments(broken, pictures, tmp_path / "out"))


def test_sampling_does_not_change_training(tiny_folder, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "plain"))
    train(tiny.arguments(tiny_folder, pictures, tmp_path / "sampled", sample_prompts=prompts, sample_every_n_steps=2))
    assert weights_equal(tmp_path / "plain" / "lora.safetensors", tmp_path / "sampled" / "lora.safetensors")


def test_before_after_shows_two_rows_that_differ(tiny_folder, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 3 --d 1\n", encoding="utf-8")
    train(
        tiny.arguments(
            tiny_folder, pictures, tmp_path / "out", sample_prompts=prompts, before_after=True, learning_rate=0.05
        )
    )
    sheet = np.asarray(Image.open(tmp_path / "out" / "before_after.png"), dtype=int)
    rows = sheet[44:, 70:]
    half = rows.shape[0] // 2
    assert abs(rows[:half] - rows[half : 2 * half]).mean() > 1


def test_a_thumbnail_goes_into_the_metadata_as_a_data_url(tiny_file, pictures, tmp_path):
    thumbnail = pictures / "2_cat" / "picture 0.png"
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", metadata_thumbnail=thumbnail, metadata_author="我"))
    metadata = metadata_of(tmp_path / "out" / "lora.safetensors")
    assert metadata["modelspec.thumbnail"].startswith("data:image/png;base64,iVBOR")
    assert metadata["modelspec.author"] == "我"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"optimizer_type": "bitsandbytes.optim.NoSuch"}, "NoSuch: bitsandbytes.optim has no NoSuch"),
        ({"optimizer_type": "torch.optim"}, "--optimizer_type torch.optim is no optimizer class but a module"),
        ({"optimizer_args": ["weight_decya=1"]}, "AdamW has no argument weight_decya; did you mean weight_decay"),
        ({"lr_scheduler_type": "torch.nn.NoSuchLR"}, "--lr_scheduler_type torch.nn.NoSuchLR: "),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_args: StepLR needs step_size"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='soon:5'"]},
            "--lr_scheduler_args do not fit the schedule piecewise_constant",
        ),
        ({"lr_scheduler": "adafactor"}, "--lr_scheduler adafactor goes with --optimizer_type Adafactor"),
    ],
)
def test_optimizers_and_schedules_that_there_are_not_are_told_before_the_model_is_loaded(
    given, sentence, tiny_file, pictures, tmp_path
):
    weights = load_file(tiny_file)
    name = "model.diffusion_model.out.2.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=sentence):
        train(tiny.arguments(tmp_path / "broken.safetensors", pictures, tmp_path / "out", **given))
