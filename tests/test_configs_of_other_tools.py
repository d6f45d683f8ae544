"""Configurations of lora-scripts and kohya_ss, in the shapes these tools write, are read as what they mean there."""

import json
import logging
from pathlib import Path

import pytest
import toml
from safetensors.torch import load_file

from library.errors import UserError
from library.options.cli import read_options
from library.options.config_file import Given
from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from library.options.imports import kohya_ss, lora_scripts, translate
from library.training.prompts import prompts_of
from tools.write_other_tools_doc import PATH, other_tools_document
from train_network import train

FLAGS = flags_of(TrainNetworkOptions)
KEYS = json.loads((Path(__file__).parent / "data" / "other_tools_keys.json").read_text(encoding="utf-8"))
REQUIRED = {"pretrained_model_name_or_path": "m.safetensors", "train_data_dir": "train", "output_dir": "out"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(values: dict, name: str = "run.toml", *argv: str) -> TrainNetworkOptions:
    return read_options(TrainNetworkOptions, ["--config_file", write(values, name), *argv])


def write(values: dict, name: str) -> str:
    text = json.dumps(values, indent=2, ensure_ascii=False) if name.endswith(".json") else toml.dumps(values)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(values: dict, name: str = "run.json", *argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(values, name, *argv)
    return caught.value.problems


# which tool a file is from


def test_a_plain_file_is_not_translated():
    given = {name: Given(1, "run.toml:1") for name in [*FLAGS, "conv_dim", "epoch", "learnin_rate", "gpu_ids"]}
    assert translate(given, FLAGS) is None
    tables = {"metadata_author": Given("me", "run.toml:2", "metadata"), "seed": Given(1, "run.toml:4", "data")}
    assert translate(tables, FLAGS) is None


@pytest.mark.parametrize("tool", [lora_scripts, kohya_ss])
def test_each_mark_of_a_tool_is_enough_and_is_of_this_tool_alone(tool):
    other = kohya_ss if tool is lora_scripts else lora_scripts
    assert not tool.MARKS & (FLAGS.keys() | other.KEYS.keys())
    for key in tool.MARKS - {"LoRA_type"}:
        assert translate({key: Given("", "f:1"), "seed": Given(1, "f:2")}, FLAGS).tool == tool.NAME


@pytest.mark.parametrize(
    ("tool", "keys"),
    [
        (lora_scripts, sum(KEYS["lora_scripts"]["default.toml"].values(), []) + KEYS["lora_scripts"]["basic_page"]),
        (lora_scripts, KEYS["lora_scripts"]["not_flags"]),
        (kohya_ss, sum(KEYS["kohya_ss"].values(), [])),
    ],
)
def test_every_key_of_the_tool_is_known(tool, keys):
    assert len(keys) > 30
    assert set(keys) - FLAGS.keys() <= tool.KEYS.keys()


# lora-scripts


def default_toml() -> dict:
    """`config/default.toml` in its sections."""
    return {
        "model": {
            "v2": False,
            "v_parameterization": False,
            "pretrained_model_name_or_path": "m.ckpt",
        },
        "dataset": {
            **{"train_data_dir": "train", "reg_data_dir": "", "prior_loss_weight": 1},
            **{"cache_latents": True, "shuffle_caption": True, "enable_bucket": True},
        },
        "additional_network": {
            **{"network_dim": 32, "network_alpha": 16, "network_train_unet_only": False},
            **{"network_train_text_encoder_only": False, "network_module": "networks.lora", "network_args": []},
        },
        "optimizer": {
            **{"unet_lr": 1e-4, "text_encoder_lr": 1e-5, "optimizer_type": "AdamW8bit"},
            **{"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0, "lr_restart_cycles": 3},
        },
        "training": {
            **{"resolution": "512,512", "train_batch_size": 1, "max_train_epochs": 10, "noise_offset": 0.0},
            **{"keep_tokens": 0, "xformers": True, "lowram": False, "clip_skip": 2},
            **{"mixed_precision": "fp16", "save_precision": "fp16"},
        },
        "sample_prompt": {"sample_sampler": "euler_a", "sample_every_n_epochs": 1},
        "saving": {
            **{"output_name": "cat", "save_every_n_epochs": 1, "save_n_epoch_ratio": 0, "save_last_n_epochs": 499},
            **{"save_state": False, "save_model_as": "safetensors", "output_dir": "out", "logging_dir": "logs"},
            "log_prefix": "cat",
        },
        "others": {
            **{"min_bucket_reso": 256, "max_bucket_reso": 1024, "caption_extension": ".txt"},
            **{"max_token_length": 225, "seed": 1337},
        },
    }


@pytest.mark.parametrize("suffix", ["", "_arguments"])
def test_the_default_files_of_lora_scripts_are_read(suffix):
    sections = default_toml()
    listed = KEYS["lora_scripts"]["default.toml"]
    assert {name: list(values) for name, values in sections.items()} == listed
    options = read({f"{name}{suffix}": values for name, values in sections.items()})
    assert (options.lr_scheduler_num_cycles, options.save_n_epoch_ratio, options.reg_data_dir) == (3, None, None)
    assert (options.network_args, options.text_encoder_lr, options.max_token_length) == (None, [1e-5], 225)


PAGE = {  # what the expert page of lora-scripts holds before it makes sd-scripts' options of it
    **{"model_train_type": "sd-lora", **REQUIRED, "reg_data_dir": "", "resolution": "512,512", "enable_bucket": True},
    **{"learning_rate": "1e-4", "unet_lr": "1", "text_encoder_lr": "0.5", "lr_scheduler": "cosine", "seed": 1337},
    **{"optimizer_type": "Prodigy", "prodigy_d0": "", "prodigy_d_coef": "2.0", "optimizer_args_custom": ["d0=1e-5"]},
    **{"network_module": "lycoris.kohya", "lycoris_algo": "locon", "network_dim": 32, "network_alpha": 32},
    **{"conv_dim": 4, "conv_alpha": 1, "dropout": 0, "train_norm": True, "lokr_factor": 8, "dylora_unit": 4},
    **{"enable_block_weights": False, "down_lr_weight": "1,1", "mid_lr_weight": "1", "up_lr_weight": "1,1"},
    **{"block_lr_zero_threshold": 0, "enable_base_weight": False, "base_weights": "a.safetensors"},
    **{"network_args_custom": ["preset=attn-mlp", "conv_dim=8"], "lr_warmup_steps": 0},
    **{"enable_preview": True, "randomly_choice_prompt": False, "prompt_file": "", "sample_every_n_epochs": 2},
    **{"positive_prompts": "1girl,\nsolo", "negative_prompts": "lowres", "sample_width": 448, "sample_height": 640},
    **{"sample_cfg": 6.5, "sample_seed": 7, "sample_steps": 20, "sample_sampler": "euler_a"},
    **{"max_token_length": 255, "caption_extension": ".txt", "gpu_ids": ["1"], "ui_custom_params": ""},
}


def test_lycoris_prodigy_and_previews_of_lora_scripts(caplog):
    options = read(PAGE)
    assert options.network_module == "lycoris.kohya"
    assert sorted(options.network_args) == [
        *("algo=locon", "conv_alpha=1", "conv_dim=8", "dropout=0", "preset=attn-mlp", "train_norm=True")
    ]
    assert sorted(options.optimizer_args) == [
        *("d0=1e-5", "d_coef=2.0", "decouple=True", "use_bias_correction=True", "weight_decay=0.01")
    ]
    assert (options.learning_rate, options.unet_lr, options.text_encoder_lr) == (1e-4, 1.0, [0.5])
    assert (options.max_token_length, options.base_weights) == (225, None)
    (prompt,) = prompts_of(options.sample_prompts)
    assert (prompt.prompt, prompt.negative_prompt) == ("1girl, solo", "lowres")
    assert (prompt.width, prompt.height, prompt.scale, prompt.seed, prompt.sample_steps) == (448, 640, 6.5, 7, 20)
    assert options.sources["network_args"].startswith("run.toml:")
    (report,) = caplog.messages
    assert "run.toml is read as a configuration of lora-scripts" in report
    assert "lokr_factor (counts only with lycoris_algo = lokr)" in report
    assert "gpu_ids (choose GPUs with accelerate launch --gpu_ids, or with CUDA_VISIBLE_DEVICES)" in report
    assert len(report.splitlines()) < 15


@pytest.mark.parametrize(
    ("changed", "name", "value"),
    [
        ({"lycoris_algo": "lokr", "network_args_custom": []}, "factor=8", True),
        ({"network_module": "networks.lora"}, "algo=locon", False),
        ({"network_module": "networks.dylora"}, "unit=4", True),
        ({"network_module": "networks.lora", "enable_block_weights": True}, "down_lr_weight=1,1", True),
        ({"network_module": "networks.lora", "enable_block_weights": False}, "down_lr_weight=1,1", False),
        ({"network_args": ["algo=loha"]}, "algo=loha", True),
    ],
)
def test_arguments_count_with_what_switches_them_on(changed, name, value):
    assert (name in read(PAGE | changed).network_args) is value


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"enable_preview": False}, {"sample_prompts": None, "sample_every_n_epochs": None}),
        ({"prompt_file": "p.txt"}, {"sample_prompts": "p.txt"}),
        ({"enable_base_weight": True}, {"base_weights": ["a.safetensors"], "base_weights_multiplier": None}),
        ({"optimizer_type": "AdamW", "optimizer_args_custom": []}, {"optimizer_args": None, "unet_lr": 1.0}),
        ({"optimizer_type": "DAdaptLion", "optimizer_args_custom": []}, {"optimizer_args": None, "learning_rate": 1.0}),
        ({"optimizer_type": "DAdaptAdam"}, {"optimizer_args": ["decouple=True", "weight_decay=0.01", "d0=1e-5"]}),
        ({"ui_custom_params": "seed = 5\nlycoris_algo = 'loha'"}, {"seed": 5}),
    ],
)
def test_rules_of_lora_scripts(changed, expected):
    Path("p.txt").write_text("a cat", encoding="utf-8")
    Path("a.safetensors").touch()
    options = read(PAGE | changed)
    assert {name: getattr(options, name) for name in expected} == expected


def test_warmup_makes_prodigy_careful():
    assert "safeguard_warmup=True" in read(PAGE | {"lr_warmup_steps": 10}).optimizer_args


def test_a_preset_has_its_description_left_out(caplog):
    metadata = {"name": "LoKr", "version": "0.0.1", "author": "a", "train_type": "lora-master", "description": "d"}
    data = {"network_module": "lycoris.kohya", "lycoris_algo": "lokr", "conv_dim": 10000, "lokr_factor": 8}
    options = read({"metadata": metadata, "data": REQUIRED | data | {"resolution": "512"}})
    assert options.network_args == ["algo=lokr", "conv_dim=10000", "factor=8"]
    assert "name, version, author, train_type, description (describes the preset)" in caplog.text


def test_mistakes_in_a_translated_file_name_the_line_of_its_key():
    values = PAGE | {"ui_custom_params": "seed = 1\nvae = cat"}
    line = list(values).index("ui_custom_params") + 1
    sentence = "not valid TOML: 'cat' is not a value; text needs quotes, a list brackets"
    assert problems(values, "run.toml") == [f"run.toml:{line}: ui_custom_params:2: {sentence}"]
    values = PAGE | {"lr_restart_cycles": "many", "learnin_rate": 1}
    line = list(values).index("lr_restart_cycles") + 1
    assert problems(values, "run.toml", "--strict_config") == [
        f"run.toml:{line}: lr_scheduler_num_cycles must be a whole number, got 'many'",
        f"run.toml:{line + 1}: learnin_rate is not an option of this script; did you mean learning_rate?",
    ]


# kohya_ss

GUI_VALUES = {  # a saved GUI: numbers as texts, texts for choices; all others are empty, 0 or false
    **REQUIRED,
    **{"LoRA_type": "Standard", "LyCORIS_preset": "full", "max_resolution": "512,640", "optimizer": "AdamW8bit"},
    **{"optimizer_args": '"weight_decay=0.1"  betas=0.9,0.99', "lr_scheduler": "cosine", "lr_warmup": 10},
    **{"learning_rate": "0.0001", "unet_lr": 0.0001, "text_encoder_lr": "5e-05", "epoch": 4, "max_train_epochs": ""},
    **{"max_train_steps": 0, "network_dim": 8, "network_alpha": "4", "conv_dim": 1, "conv_alpha": 1, "unit": 1},
    **{"factor": -1, "train_on_input": True, "caption_extension": ".txt", "clip_skip": "2", "keep_tokens": "1"},
    **{"noise_offset": "0.05", "noise_offset_type": "Original", "multires_noise_iterations": 6},
    **{"multires_noise_discount": 0.3, "adaptive_noise_scale": "0.005", "max_token_length": "75", "seed": "1234"},
    **{"xformers": "sdpa", "enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 2048},
    **{"bucket_reso_steps": 64.0, "train_batch_size": 2, "save_every_n_epochs": 1, "save_precision": "fp16"},
    **{"mixed_precision": "no", "dynamo_backend": "no", "dynamo_mode": "default", "num_cpu_threads_per_process": 2},
    **{"num_processes": 1, "num_machines": 1, "save_model_as": "safetensors", "loss_type": "l2", "huber_c": 0.1},
    **{"huber_schedule": "snr", "model_list": "custom", "prior_loss_weight": 1.0, "max_grad_norm": 1},
    **{"gradient_accumulation_steps": 1.0, "max_timestep": 1000, "sdxl_no_half_vae": True, "sample_sampler": "euler_a"},
    **{"sample_prompts": "a cat --w 64\n# no\na dog", "sample_every_n_epochs": 1, "max_data_loader_n_workers": "0"},
    **{"lr_scheduler_num_cycles": "", "timestep_sampling": "sigma", "discrete_flow_shift": 3, "t5xxl": ""},
    **{"model_prediction_type": "sigma_scaled", "train_blocks": "all", "guidance_scale": 3.5, "output_name": "cat"},
    **{"stop_text_encoder_training": 0, "additional_parameters": "", "network_dropout": 0, "rank_dropout": 0.1},
}
OFF_VALUES = {
    name: {"bool": False, "str": "", "path": "", "prompts": ""}.get(flag.kind, 0) for name, flag in FLAGS.items()
}


def gui_file(**changed) -> dict:
    """All keys of the presets, with the values above and what the GUI has for the rest."""
    keys = [key for name in ("flags", "of_other_trainers", "not_flags") for key in KEYS["kohya_ss"][name]]
    assert len(keys) == 185
    return {key: OFF_VALUES.get(key, "") for key in keys} | GUI_VALUES | changed


def test_a_file_of_kohya_ss_with_all_its_keys(caplog):
    caplog.set_level(logging.WARNING)
    options = read(gui_file(), "run.json")
    expected = {
        **{"resolution": "512,640", "optimizer_type": "AdamW8bit", "network_module": "networks.lora", "sdpa": True},
        **{"optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"], "lr_warmup_steps": 0.1, "max_train_epochs": 4},
        **{"learning_rate": 1e-4, "unet_lr": 1e-4, "text_encoder_lr": [5e-5], "network_args": ["rank_dropout=0.1"]},
        **{"noise_offset": 0.05, "adaptive_noise_scale": 0.005, "multires_noise_iterations": None},
        **{"max_train_steps": 1600, "xformers": False, "no_half_vae": False, "seed": 1234, "clip_skip": 2},
        **{"keep_tokens": 1, "max_token_length": None, "bucket_reso_steps": 64, "max_data_loader_n_workers": 0},
        **{"vae_batch_size": 1, "scale_weight_norms": None, "lr_scheduler_num_cycles": 1, "network_alpha": 4.0},
    }
    assert {name: getattr(options, name) for name in expected} == expected
    assert [prompt.prompt for prompt in prompts_of(options.sample_prompts)] == ["a cat", "a dog"]
    (report,) = caplog.messages
    assert "lr_warmup = 10 -> lr_warmup_steps = 10%" in report
    assert "num_cpu_threads_per_process" in report and "multires_noise_iterations" in report
    assert len(report.splitlines()) < 20
    assert options.sources["lr_warmup_steps"] == f"run.json:{list(gui_file()).index('lr_warmup') + 2}"


LYCORIS_ON = {"conv_dim": 8, "conv_alpha": "4", "rank_dropout": 0.1, "module_dropout": 0, "rank_dropout_scale": True}
LYCORIS_ON |= {"train_norm": True, "use_tucker": True, "use_cp": True, "use_scalar": True, "factor": 6, "unit": 4}
LYCORIS_ON |= {"decompose_both": True, "dora_wd": True, "bypass_mode": True, "rescaled": True, "constrain": 0.5}
LYCORIS_ON |= {"down_lr_weight": "1, 0.5", "block_lr_zero_threshold": 0.1, "loraplus_lr_ratio": 16}
COMMON = {"conv_dim=8", "conv_alpha=4", "rank_dropout=0.1", "loraplus_lr_ratio=16", "preset=full", "train_norm=True"}
SCALED = {"rank_dropout_scale=True", "use_scalar=True"}


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        (
            "Standard",
            "networks.lora",
            {"rank_dropout=0.1", "down_lr_weight=1,0.5", "block_lr_zero_threshold=0.1", "loraplus_lr_ratio=16"},
        ),
        (
            "Kohya LoCon",
            "networks.lora",
            {
                *("conv_dim=8", "conv_alpha=4", "rank_dropout=0.1", "loraplus_lr_ratio=16"),
                *("down_lr_weight=1,0.5", "block_lr_zero_threshold=0.1"),
            },
        ),
        (
            "LoRA-FA",
            "networks.lora_fa",
            {"rank_dropout=0.1", "down_lr_weight=1,0.5", "block_lr_zero_threshold=0.1"},
        ),
        ("Kohya DyLoRA", "networks.dylora", {"conv_dim=8", "conv_alpha=4", "unit=4", "loraplus_lr_ratio=16"}),
        (
            "LoCon",
            "lycoris.kohya",
            COMMON | SCALED | {"algo=locon", "dora_wd=True", "bypass_mode=True", "use_tucker=True"},
        ),
        (
            "LyCORIS/LoKr",
            "lycoris.kohya",
            COMMON
            | SCALED
            | {"algo=lokr", "dora_wd=True", "bypass_mode=True", "use_cp=True", "factor=6", "decompose_both=True"},
        ),
        ("LyCORIS/iA3", "lycoris.kohya", {"algo=ia3", "preset=full", "conv_dim=8", "conv_alpha=4"}),
        ("LyCORIS/DyLoRA", "lycoris.kohya", COMMON | {"algo=dylora", "use_tucker=True", "block_size=4"}),
        ("LyCORIS/GLoRA", "lycoris.kohya", COMMON | {"algo=glora", "rank_dropout_scale=True"}),
        ("LyCORIS/BOFT", "lycoris.kohya", COMMON | SCALED | {"algo=boft", "use_tucker=True", "rescaled=True"}),
        (
            "LyCORIS/Native Fine-Tuning",
            "lycoris.kohya",
            SCALED | {"algo=full", "preset=full", "rank_dropout=0.1", "train_norm=True", "use_tucker=True"},
        ),
    ],
)
def test_lora_type_chooses_module_and_arguments(kind, module, arguments):
    options = read(gui_file(LoRA_type=kind, **LYCORIS_ON), "run.json")
    assert (options.network_module, set(options.network_args)) == (module, arguments)
    assert len(options.network_args) == len(arguments)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"text_encoder_lr": 0}, {"network_train_unet_only": True, "text_encoder_lr": None}),
        ({"unet_lr": ""}, {"network_train_text_encoder_only": True, "unet_lr": None}),
        ({"unet_lr": 0, "text_encoder_lr": "0"}, {"unet_lr": None, "text_encoder_lr": None, "learning_rate": 1e-4}),
        ({"max_train_steps": 500}, {"max_train_steps": 500, "max_train_epochs": None}),
        ({"max_train_epochs": "7"}, {"max_train_epochs": 7}),
        ({"dataset_config": "d.toml"}, {"max_train_epochs": None, "max_train_steps": 1600, "lr_warmup_steps": 0}),
        ({"fp8_base_unet": True}, {"fp8_base_unet": False}),
        ({"lr_warmup": 0}, {"lr_warmup_steps": 0}),
        ({"lr_warmup_steps": 30}, {"lr_warmup_steps": 30}),
        ({"xformers": "xformers"}, {"xformers": True, "sdpa": False}),
        ({"xformers": True}, {"xformers": True, "sdpa": False}),
        ({"xformers": "none"}, {"xformers": False, "sdpa": False}),
        ({"sdxl": True}, {"no_half_vae": True, "cache_text_encoder_outputs": False}),
        (
            {"sdxl": True, "sdxl_cache_text_encoder_outputs": True, "text_encoder_lr": 0},
            {"cache_text_encoder_outputs": True, "network_train_unet_only": True},
        ),
        ({"sdxl_cache_text_encoder_outputs": True}, {"cache_text_encoder_outputs": False, "no_half_vae": False}),
        (
            {"noise_offset_type": "Multires"},
            {"noise_offset": None, "adaptive_noise_scale": None, "multires_noise_iterations": 6},
        ),
        ({"prior_loss_weight": 0}, {"prior_loss_weight": 1.0}),
        ({"seed": ""}, {"seed": None}),
        ({"lr_scheduler": "cosine_with_restarts"}, {"lr_scheduler_num_cycles": 4}),
        ({"lr_scheduler_args": "T_max=1000 eta_min=0"}, {"lr_scheduler_args": ["T_max=1000", "eta_min=0"]}),
        (
            {"additional_parameters": '--network_dim 16 --caption_prefix "C:\\x y" --optimizer_args "a=1" b=2'},
            {"network_dim": 16, "caption_prefix": "C:\\x y", "optimizer_args": ["a=1", "b=2"]},
        ),
    ],
)
def test_rules_of_kohya_ss(changed, expected):
    options = read(gui_file(**changed), "run.json")
    assert {name: getattr(options, name) for name in expected} == expected


def test_a_zero_that_kohya_ss_does_not_hand_on_is_said(caplog):
    read(gui_file(max_grad_norm=0), "run.json")
    assert "max_grad_norm (kohya_ss hands on no 0: the default, 1.0, counts)" in caplog.text


def test_the_command_line_goes_before_the_file_and_its_additional_parameters():
    values = gui_file(additional_parameters="--seed 5 --network_dim 2")
    options = read(values, "run.json", "--seed", "6")
    assert (options.seed, options.network_dim) == (6, 2)
    assert options.sources["network_dim"] == f"run.json:{list(values).index('additional_parameters') + 2}"


def test_the_toml_that_kohya_ss_makes_is_read(caplog):
    values = {
        **REQUIRED,
        **{"epoch": 4, "max_train_steps": 120, "lr_warmup_steps": 12, "noise_offset_type": "Multires", "sdpa": True},
        **{"network_module": "networks.lora", "network_args": ["conv_dim=4", "conv_alpha=1"], "resolution": "512,512"},
        **{"network_train_unet_only": True, "unet_lr": 1e-4, "lr_scheduler": "cosine", "loraplus_lr_ratio": 16},
        **{"multires_noise_iterations": 6, "stop_text_encoder_training": 3, "max_data_loader_n_workers": 0},
        **{"lr_scheduler_args": [], "optimizer_type": "AdamW8bit", "optimizer_args": [], "wandb_run_name": "cat"},
    }
    options = read(values, "config_lora-20240101-000000.toml")
    assert options.network_args == ["loraplus_lr_ratio=16", "conv_dim=4", "conv_alpha=1"]
    assert (options.max_train_epochs, options.max_train_steps, options.lr_warmup_steps) == (None, 120, 12)
    assert options.network_train_unet_only and options.multires_noise_iterations == 6
    assert "epoch (max_train_steps is given)" in caplog.text


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"LoRA_type": "LyCORIS/LoBa"}, "LoRA_type LyCORIS/LoBa is not known; known are Standard, "),
        ({"epoch": "many"}, "max_train_epochs must be a whole number, got 'many'"),
        ({"additional_parameters": '--seed "1'}, "additional_parameters has a quotation mark without its partner"),
        ({"additional_parameters": "--sed 1"}, "--sed is not a flag of this script; did you mean --seed?"),
        ({"additional_parameters": "--seed x"}, "seed must be a whole number, got 'x'"),
        ({"unet_lr": 0, "text_encoder_lr": 0, "learning_rate": 0}, "learning_rate, unet_lr and text_encoder_lr leave "),
        ({"max_resolution": "big"}, "--resolution must be a size such as 512 or 512,768 (width,height), got 'big'"),
    ],
)
def test_mistakes_in_a_file_of_kohya_ss_have_their_line(changed, sentence):
    values = gui_file(**changed)
    key = "learning_rate" if "learning_rate" in changed else next(iter(changed))
    (problem,) = problems(values)
    assert problem.startswith(f"run.json:{list(values).index(key) + 2}: {sentence}")


# JSON as such


def test_json_of_plain_options_is_read(caplog):
    options = read(REQUIRED | {"resolution": 512, "network_dim": "8", "vae": None}, "运行 1.json")
    assert (options.resolution, options.network_dim, options.sources["network_dim"]) == ("512", 8, "运行 1.json:6")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seed": 1,\n"network_dim": }', "run.json:2: not valid JSON: Expecting value"),
        ("[1]", "run.json: a configuration in JSON is an object, {"),
    ],
)
def test_broken_json_is_one_sentence(text, sentence):
    Path("run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_options(TrainNetworkOptions, ["--config_file", "run.json"])
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(sentence)


# the page, and runs


def test_the_page_is_what_the_tables_make():
    assert PATH.read_text(encoding="utf-8") == other_tools_document(), "run python tools/write_other_tools_doc.py"
    assert all(f"| `{key}` |" in other_tools_document() for tool in (lora_scripts, kohya_ss) for key in tool.KEYS)


def replaced(values: dict, model: Path, pictures: Path) -> dict:
    """The same file for two quick steps on the toy model."""
    return values | {
        **{"pretrained_model_name_or_path": str(model), "train_data_dir": str(pictures), "output_name": "cat"},
        **{"max_train_steps": 2, "sample_every_n_steps": 2, "network_dim": 4, "min_bucket_reso": 64},
        "mixed_precision": "no",
    }


RUNS = {
    "page.toml": {
        **PAGE,
        **{"network_module": "networks.lora", "network_args_custom": ["conv_dim=2"], "resolution": "128,128"},
        **{"sample_width": 64, "sample_height": 64, "sample_steps": 1, "text_encoder_lr": "1"},
        "max_data_loader_n_workers": 0,
    },
    "gui.json": {
        **GUI_VALUES,
        **{"LoRA_type": "Kohya LoCon", "max_resolution": "128,128", "lr_warmup": "50", "optimizer": "AdamW"},
        "sample_prompts": "a cat --w 64 --h 64 --s 1",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_file_of_each_tool_trains(name, tiny_file, pictures):
    values = replaced(RUNS[name], tiny_file, pictures)
    values.pop("sample_every_n_epochs")
    train(["--config_file", write(values, name)])
    weights = load_file("out/cat.safetensors")
    ranks = {weight.shape[0] for key, weight in weights.items() if "lora_down" in key}
    assert ranks == ({2, 4} if name == "page.toml" else {1, 4})
    assert list(Path("out/sample").glob("*.png"))
