"""How options are read, converted and checked, and what is said where something is wrong."""

import logging
from pathlib import Path

import pytest

from library.errors import UserError
from library.options import derived
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.options.honoured import warnings_for
from library.options.launch import OTHER_ENGINES, launch_problems, launch_warnings

REQUIRED = [
    *("--pretrained_model_name_or_path", "model.safetensors", "--train_data_dir", "pictures"),
    *("--output_dir", "output", "--resolution", "512"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*argv):
    return read_options(TrainNetworkOptions, [*REQUIRED, *argv])


def problems(*argv):
    with pytest.raises(UserError) as caught:
        read(*argv)
    return caught.value.problems


def read_config(text, *argv):
    Path("train.toml").write_text(text, encoding="utf-8")
    return read("--config_file", "train.toml", *argv)


def config_problems(text, *argv):
    Path("train.toml").write_text(text, encoding="utf-8")
    return problems("--config_file", "train.toml", *argv)


# precedence and configuration files


def test_command_line_goes_before_file_before_defaults(folder):
    options = read_config("seed = 1\nnetwork_dim = 8\n", "--seed", "2")
    assert (options.seed, options.network_dim, options.train_batch_size) == (2, 8, 1)


def test_sources_say_where_an_option_was_set(folder):
    options = read_config("\n# a comment\n[network]\nnetwork_dim = 8\n", "--seed", "2")
    assert options.sources["network_dim"] == "train.toml:4"
    assert options.sources["seed"] == "command line"
    assert "train_batch_size" not in options.sources


def test_toml_ending_is_added(folder):
    (folder / "run.toml").write_text("seed = 7", encoding="utf-8")
    assert read("--config_file", "run").seed == 7


def test_tables_are_flattened_and_the_last_key_counts(folder):
    assert read_config("seed = 1\n[a]\nseed = 2\n[b]\nseed = 3\n").seed == 3


def test_switch_in_the_file_stays_on(folder):
    assert read_config("cache_latents = true").cache_latents is True


def test_file_with_byte_order_mark_is_read(folder):
    (folder / "run.toml").write_bytes(b"\xef\xbb\xbfoutput_name = '\xe7\x8c\xab'")
    assert read("--config_file", "run").output_name == "猫"


def test_prefix_of_a_flag_is_enough():
    assert read("--network_al", "4").network_alpha == 4.0


# conversion


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate = '1e-4'", "learning_rate", 1e-4),
        ("cache_latents = 'true'", "cache_latents", True),
        ("cache_latents = 'False'", "cache_latents", False),
        ("resolution = 768", "resolution", "768"),
        ("resolution = [512, 768]", "resolution", "512,768"),
        ("seed = '12'", "seed", 12),
        ("max_train_steps = 1e3", "max_train_steps", 1000),
        ("text_encoder_lr = 1e-5", "text_encoder_lr", [1e-5]),
        ("text_encoder_lr = ['1e-5', '0']", "text_encoder_lr", [1e-5, 0.0]),
        ("network_args = 'conv_dim=4'", "network_args", ["conv_dim=4"]),
        ("network_args = []", "network_args", None),
        ("optimizer_type = ''", "optimizer_type", ""),
        ("reg_data_dir = ''", "reg_data_dir", None),
        ("caption_separator = ''", "caption_separator", ","),
        ("unet_lr = 0", "unet_lr", 0),
        ("seed = 0", "seed", 0),
        ("max_token_length = 75", "max_token_length", None),
        ("max_token_length = 225", "max_token_length", 225),
        ("max_token_length = 255", "max_token_length", 225),
        ("scale_weight_norms = 0.0", "scale_weight_norms", None),
        ('sample_prompts = "a cat\\na dog"', "sample_prompts", "a cat\na dog"),
        ("dynamo_backend = 'no'", "dynamo_backend", "inductor"),
        ("output_name = 'a \"b\" c'", "output_name", 'a "b" c'),
    ],
)
def test_value_in_the_file_is_converted(folder, line, name, value):
    converted = getattr(read_options(TrainNetworkOptions, config_argv(line)), name)
    assert (converted, type(converted)) == (value, type(value))


def config_argv(line):
    Path("train.toml").write_text(line, encoding="utf-8")
    given = [] if line.startswith("resolution") else REQUIRED[6:]
    return [*REQUIRED[:6], *given, "--config_file", "train.toml"]


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("100", 100), ("0.05", 0.05), ("10%", 0.1), ("100%", 1.0), ("2.5%", 0.025)]
)
def test_warmup_is_a_count_or_a_share(text, value):
    warmup = read("--lr_warmup_steps", text, "--lr_scheduler", "cosine").lr_warmup_steps
    assert (warmup, type(warmup)) == (value, type(value))


def test_alpha_is_int_by_default_and_from_toml_but_float_from_the_command_line(folder):
    for name in ("network_alpha", "lr_scheduler_power"):
        assert type(getattr(read(), name)) is int
        assert type(getattr(read(f"--{name}", "1"), name)) is float
        assert type(getattr(read_config(f"{name} = 1"), name)) is int
        assert type(getattr(read_config(f"{name} = 1.0"), name)) is float


def test_empty_value_on_the_command_line_unsets_that_of_the_file(folder):
    options = read_config("reg_data_dir = 'reg'", "--reg_data_dir", "")
    assert options.reg_data_dir is None
    assert "reg_data_dir" not in options.sources


# mistakes in the file


def test_unknown_key_is_a_warning_with_line_and_nearest_name(folder, caplog):
    with caplog.at_level(logging.WARNING):
        read_config("seed = 1\nlearnin_rate = 1e-4\n")
    assert caplog.messages == [
        "train.toml:2: learnin_rate is not an option of this script; did you mean learning_rate? (ignored)"
    ]


@pytest.mark.parametrize(("text", "argv"), [("", ["--strict_config"]), ("strict_config = true\n", [])])
def test_unknown_key_is_an_error_when_strict(folder, text, argv):
    (problem,) = config_problems(text + "[a]\nnetwork_dims = 4", *argv)
    assert problem.endswith(": network_dims is not an option of this script; did you mean network_dim?")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train_batch_size = 'many'", "train_batch_size must be a whole number, got 'many'"),
        ("train_batch_size = 1.5", "train_batch_size must be a whole number, got 1.5"),
        ("train_batch_size = true", "train_batch_size must be a whole number, got true"),
        ("learning_rate = nan", "learning_rate must be a number, got nan"),
        ("learning_rate = inf", "learning_rate must be a number, got inf"),
        ("cache_latents = 'yes'", "cache_latents must be true or false, got 'yes'"),
        ("output_name = true", "output_name must be text in quotes, got true"),
        ("save_precision = 'nonsense'", "save_precision must be one of float, fp16, bf16, got 'nonsense'"),
        ("text_encoder_lr = ['a']", "text_encoder_lr must be a number, got ['a']"),
        ("network_dim = 0", "--network_dim must be at least 1, got 0"),
    ],
)
def test_wrong_value_in_the_file_is_an_error_with_its_line(folder, line, sentence):
    assert config_problems(f"seed = 1\n\n{line}\n") == [f"train.toml:3: {sentence}"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed = 1\nnetwork_dim = \n", "train.toml:2: not valid TOML: Empty value is invalid"),
        ("output_name = cat", "train.toml:1: not valid TOML: 'cat' is not a value; text needs quotes"),
        ("seed = 1\nseed = 2", "train.toml:2: not valid TOML: seed stands twice, first on line 1"),
        ("[a]\nseed = 1\n[a]\nv2 = true", "train.toml:3: not valid TOML: [a] stands twice; put both into one"),
        (
            "text_encoder_lr = [1e-4, 0]",
            "train.toml:1: not valid TOML: a list of mixed types; beside 0.1 write 0.0 for",
        ),
        ("network_args = ['conv_dim=4'", "train.toml: not valid TOML: the last list is not closed with ]"),
        ("network_args = ['a, b'", "train.toml: not valid TOML: quotes or brackets are open"),
        ("cache_latents = True", "train.toml:1: not valid TOML: Only all lowercase booleans allowed"),
        ("seed = None", "train.toml:1: not valid TOML: a value that is neither text in quotes, a number, "),
    ],
)
def test_broken_toml_is_one_sentence(folder, text, sentence):
    (problem,) = config_problems(text)
    assert problem.startswith(sentence)


def test_backslash_in_double_quotes_gets_a_hint(folder):
    (problem,) = config_problems('seed = 1\nvae = "C:\\Users\\me"\n')
    assert problem.startswith("train.toml:")
    assert "single quotes" in problem


def test_path_with_a_tab_from_an_escape_is_an_error(folder):
    (problem,) = config_problems('reg_data_dir = "D:\\train"')
    assert problem.startswith("train.toml:1: reg_data_dir must be a path without control characters")


def test_file_in_another_encoding_is_an_error_with_its_line(folder):
    (folder / "run.toml").write_bytes(b"seed = 1\noutput_name = '\xff'")
    assert problems("--config_file", "run") == ["run.toml:2: the file is not in UTF-8: save it as UTF-8"]


def test_missing_file_is_the_only_problem_that_is_named():
    with pytest.raises(UserError) as caught:
        read_options(TrainNetworkOptions, ["--config_file", "nowhere/run"])
    assert caught.value.problems == [f"--config_file: there is no file {Path('nowhere/run.toml')}"]


# names of other tools


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr_restart_cycles = 3", "lr_scheduler_num_cycles", 3),
        ("max_train_epoches = 4", "max_train_epochs", 4),
        ("epoch = 5", "max_train_epochs", 5),
        ("optimizer = 'Lion'", "optimizer_type", "Lion"),
        ("max_resolution = '640,640'", "resolution", "640,640"),
        ("caption_extention = '.txt'", "caption_extension", ".txt"),
    ],
)
def test_alias_is_read_and_reported(folder, caplog, line, name, value):
    with caplog.at_level(logging.WARNING):
        options = read_options(TrainNetworkOptions, [*REQUIRED[:6], *without_resolution(line)])
    assert getattr(options, name) == value
    assert caplog.messages == [f"train.toml:1: {line.split()[0]} is read as {name}"]


def without_resolution(line):
    argv = config_argv(line)[6:]
    return [word for word in argv if word not in REQUIRED[6:]] if "resolution" in line else argv


def test_epoch_yields_to_max_train_steps(folder, caplog):
    options = read_config("epoch = 1\nmax_train_steps = 500\n")
    assert (options.max_train_epochs, options.max_train_steps) == (None, 500)
    assert caplog.messages == ["train.toml:1: epoch is ignored, max_train_steps is given too"]


# mistakes on the command line


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--learnin_rate", "1"], "--learnin_rate is not a flag of this script; did you mean --learning_rate?"),
        (["--network-dim=8"], "--network-dim is not a flag of this script; did you mean --network_dim?"),
        (["--lr_restart_cycles", "2"], "--lr_restart_cycles is not a flag of this script; did you mean "),
        (["--seed", "x"], "--seed must be a whole number, got 'x'"),
        (["--loss_type", "l3"], "--loss_type must be one of l1, l2, huber, smooth_l1, got 'l3'"),
        (["--seed"], "--seed needs a value, none was given"),
        (["--save_last", "2"], "--save_last is short for more than one flag: --save_last_n_epochs, "),
        (["--cache_latents=true"], "--cache_latents takes no value, got 'true'"),
        (["--cache_latents", "true"], "'true' on the command line belongs to no flag: switches take no value"),
        (["--learning_rate", "nan"], "--learning_rate must be a number, got 'nan'"),
        (["--lr_warmup_steps", "1.5"], "--lr_warmup_steps must be a whole number of steps, or a share of all steps"),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0, got -1.0"),
        (["--train_batch_size", "-1"], "--train_batch_size must be at least 1, got -1"),
        (["--max_train_epochs", "0"], "--max_train_epochs must be at least 1, got 0"),
        (["--save_every_n_steps", "0"], "--save_every_n_steps must be at least 1, got 0"),
        (["--clip_skip", "0"], "--clip_skip must be at least 1, got 0"),
        (["--caption_dropout_rate", "1.1"], "--caption_dropout_rate must be a share from 0 to 1, got 1.1"),
        (["--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--max_timestep", "1001"], "--max_timestep must be at most 1000, got 1001"),
        (["--cache_latents", "--color_aug"], "--cache_latents does not go with --color_aug: "),
        (["--cache_latents_to_disk", "--random_crop"], "--cache_latents_to_disk does not go with --random_crop: "),
        (
            ["--network_train_unet_only", "--network_train_text_encoder_only"],
            "--network_train_unet_only does not go with --network_train_text_encoder_only: ",
        ),
        (["--full_fp16"], "--full_fp16 needs --mixed_precision fp16, got no"),
        (["--full_bf16", "--mixed_precision", "fp16"], "--full_bf16 needs --mixed_precision bf16, got fp16"),
        (["--use_8bit_adam", "--use_lion"], "--use_8bit_adam does not go with --use_lion_optimizer: "),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], "--use_8bit_adam does not go with --optimizer_type: "),
        (["--adaptive_noise_scale", "0.1"], "--adaptive_noise_scale needs --noise_offset"),
        (["--scale_v_pred_loss_like_noise_pred"], "--scale_v_pred_loss_like_noise_pred needs --v_parameterization"),
        (["--v_pred_like_loss", "1", "--v_para"], "--v_pred_like_loss does not go with --v_parameterization: "),
        (["--lr_warmup_steps", "10"], "--lr_warmup_steps does not go with --lr_scheduler constant: "),
        (["--lr_scheduler", "Cosine"], "--lr_scheduler Cosine is not known; did you mean cosine?"),
        (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler cosine_with_min_lr needs "),
        (["--optimizer_args", "a=1=2"], "--optimizer_args takes key=value with one equals sign, got 'a=1=2'"),
        (["--network_args", "conv_dim"], "--network_args takes key=value, got 'conv_dim'"),
        (["--network_args", "conv_dim=4 conv_alpha=1"], "--network_args takes one key=value an item, got "),
        (["--resolution", "big"], "--resolution must be a size such as 512 or 512,768 (width,height), got 'big'"),
        (["--resolution", "0"], "--resolution must be a size such as 512"),
        (
            ["--enable_bucket", "--resolution", "1216"],
            "--resolution must not be above --max_bucket_reso 1024 with --enable_bucket, got 1216",
        ),
        (
            ["--enable_bucket", "--resolution", "192"],
            "--resolution must not be below --min_bucket_reso 256 with --enable_bucket, got 192",
        ),
        (
            ["--enable_bucket", "--min_bucket_reso", "32", "--resolution", "32"],
            "--resolution must not be below --bucket_reso_steps 64 with --enable_bucket, got 32",
        ),
        (
            ["--enable_bucket", "--min_bucket_reso", "1088"],
            "--min_bucket_reso must not be above --max_bucket_reso, got 1088 and 1024",
        ),
        (["--network_weights", "no.safetensors"], "--network_weights: there is no file no.safetensors"),
        (["--vae", "no.pt"], "--vae: there is no file or folder no.pt"),
        (["--resume", "no"], "--resume: there is no folder no"),
        (["--sample_prompts", "no.txt"], "--sample_prompts: there is no file no.txt"),
        (["--sample_prompts", "."], "--sample_prompts: a file must end in .txt, .toml, .json, got ."),
        (["--before_after"], "--before_after needs --sample_prompts"),
        (["--dim_from_weights"], "--dim_from_weights needs --network_weights, the file to take the rank from"),
        (["--base_weights", "no.pt"], "--base_weights: there is no file no.pt"),
        (["--base_weights_multiplier", "1"], "--base_weights_multiplier takes one number for each of --base_weights, "),
        (["--log_with", "tensorboard"], "--log_with tensorboard needs --logging_dir"),
        (["--huggingface_repo_id", "cats"], "--huggingface_repo_id must be OWNER/NAME, got 'cats'"),
        (["--huggingface_repo_visibility", "open"], "--huggingface_repo_visibility must be public or private, got "),
        (["--resume_from_huggingface"], "--resume_from_huggingface needs --resume OWNER/REPO/FOLDER"),
        (["--resume_from_huggingface", "--resume", "a/b"], "--resume must be OWNER/REPO/FOLDER[:REVISION[:TYPE]] on "),
        (["--output_name", "a/b"], "--output_name must be a name without folders, got 'a/b'"),
        (["--unet_lr", "0", "--text_encoder_lr", "0"], "--learning_rate, --unet_lr and --text_encoder_lr leave "),
        (["--deepspeed"], "--deepspeed is not supported: use accelerate launch --multi_gpu"),
        (["--output_config"], "--output_config needs --config_file"),
        (["--output_config", "--config_file", "new.json"], "--output_config writes TOML: --config_file must end in "),
    ],
)
def test_mistake_on_the_command_line_is_one_sentence(argv, sentence):
    (problem,) = problems(*argv)
    assert problem.startswith(sentence)


def test_all_required_options_are_named_at_once():
    with pytest.raises(UserError) as caught:
        read_options(TrainNetworkOptions, [])
    assert [problem.split()[0] for problem in caught.value.problems] == [
        *("--pretrained_model_name_or_path", "--train_data_dir", "--resolution", "--output_dir")
    ]


def test_problems_of_file_and_command_line_come_together(folder):
    found = config_problems("seed = 'x'\nnetwork_dim = 0\n", "--foo_bar", "1", "--max_train_steps", "ten")
    assert found == [
        "--foo_bar is not a flag of this script",
        "train.toml:1: seed must be a whole number, got 'x'",
        "--max_train_steps must be a whole number, got 'ten'",
        "train.toml:2: --network_dim must be at least 1, got 0",
    ]


def test_option_with_a_wrong_value_is_not_called_missing(folder):
    Path("train.toml").write_text("output_dir = true", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_options(TrainNetworkOptions, [*REQUIRED[:4], *REQUIRED[6:], "--config_file", "train"])
    assert caught.value.problems == ["train.toml:1: output_dir must be text in quotes, got true"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--min_timestep", "500", "--max_timestep", "500"],
        ["--lr_warmup_steps", "10", "--optimizer_type", "AdamWScheduleFree"],
        ["--lr_scheduler", "adafactor:1e-3"],
        ["--enable_bucket", "--max_bucket_reso", "1000", "--resolution", "1024"],
        ["--save_last_n_epochs", "0"],
        ["--network_train_unet_only", "--text_encoder_lr", "0"],
    ],
)
def test_unusual_but_legal_options_are_accepted(argv):
    assert read(*argv)


# --output_config


def test_output_config_writes_what_reads_back_the_same(folder, capsys):
    argv = ["--config_file", "new", "--output_config", "--wandb_api_key", "k", "--huggingface_token", "t"]
    given = ["--caption_prefix", 'C:\\x "ü"\n', "--network_args", "conv_dim=4", "a='b, c]'", "--cache_latents"]
    with pytest.raises(SystemExit) as caught:
        read(*argv, *given, "--learning_rate", "1e-5", "--text_encoder_lr", "1e-5", "1")
    assert caught.value.code == 0
    assert "new.toml" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["new.toml"]
    text = (folder / "new.toml").read_text(encoding="utf-8")
    assert not any(name in text for name in ("wandb_api_key", "huggingface_token", "output_config", "config_file"))
    options = read_options(TrainNetworkOptions, ["--config_file", "new"])
    assert options == read(*given, "--learning_rate", "1e-5", "--text_encoder_lr", "1e-5", "1", "--config_file", "new")
    assert options.caption_prefix == 'C:\\x "ü"\n'


def test_output_config_leaves_an_existing_file_alone(folder):
    (folder / "old.toml").write_text("seed = 1", encoding="utf-8")
    assert problems("--config_file", "old", "--output_config") == [
        "--output_config does not overwrite: old.toml is there already"
    ]
    assert (folder / "old.toml").read_text(encoding="utf-8") == "seed = 1"


# derived values


@pytest.mark.parametrize("text", ["512,768", "512x768", " 512 , 768 "])
def test_resolution_is_width_and_height(text):
    assert derived.resolution_wh(TrainNetworkOptions(resolution=text)) == (512, 768)


def test_single_resolution_is_a_square():
    assert derived.resolution_wh(TrainNetworkOptions(resolution="640")) == (640, 640)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "AdamW"),
        ({"use_8bit_adam": True}, "AdamW8bit"),
        ({"use_lion_optimizer": True}, "Lion"),
        ({"optimizer_type": "prodigy"}, "prodigy"),
    ],
)
def test_optimizer_name(given, name):
    assert derived.optimizer_name(TrainNetworkOptions(**given)) == name


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, (1e-4, 1e-4)),
        ({"unet_lr": 0}, (1e-4, 0)),
        ({"text_encoder_lr": [0.0]}, (0.0, 1e-4)),
        ({"text_encoder_lr": [1e-5, 1e-5], "unet_lr": 3e-5}, (1e-5, 3e-5)),
        ({"text_encoder_lr": [1e-5, 2e-5], "unet_lr": 3e-5}, ((1e-5, 2e-5), 3e-5)),
    ],
)
def test_only_a_missing_learning_rate_falls_back(given, rates):
    assert derived.learning_rates(TrainNetworkOptions(learning_rate=1e-4, **given)) == rates


def test_caption_extension_has_a_dot_and_heeds_the_old_flag():
    assert derived.caption_extension(TrainNetworkOptions(caption_extension="txt")) == ".txt"
    assert derived.caption_extension(TrainNetworkOptions(caption_extention=".tags")) == ".tags"


def test_caching_to_disk_is_caching():
    assert derived.caches_latents(TrainNetworkOptions(cache_latents_to_disk=True))
    assert not derived.caches_latents(TrainNetworkOptions())


def test_key_values_are_literals_and_bare_words_are_strings():
    items = ["betas=0.9,0.99", "nesterov=True", "name='a'", "mode=fast", "x=None"]
    assert derived.parse_key_values(items, "optimizer_args") == {
        **{"betas": (0.9, 0.99), "nesterov": True, "name": "a", "mode": "fast", "x": None}
    }


def test_network_arguments_stay_text_and_split_at_the_first_equals_sign():
    options = TrainNetworkOptions(network_args=["conv_dim=4", "network_reg_dims=a=4,b=8"])
    assert derived.network_arguments(options) == {"conv_dim": "4", "network_reg_dims": "a=4,b=8"}


# options without effect


def test_options_without_effect_are_warned_about_only_when_set():
    assert warnings_for(TrainNetworkOptions()) == []
    options = TrainNetworkOptions(mem_eff_attn=True, wandb_run_name="a", log_config=True, sample_at_first=True)
    assert warnings_for(options) == [
        "--mem_eff_attn has no effect: PyTorch's own attention, which is always used, needs as little memory",
        "--sample_at_first has no effect without --sample_prompts",
        "--log_config has no effect without --logging_dir or --log_with",
        "--wandb_run_name has no effect without --log_with wandb",
    ]


def test_a_flag_that_datasets_of_a_file_take_is_not_said_to_lack_another():
    sentence = "--bucket_no_upscale has no effect without --enable_bucket"
    assert sentence in warnings_for(TrainNetworkOptions(bucket_no_upscale=True))
    assert warnings_for(TrainNetworkOptions(bucket_no_upscale=True, dataset_config=Path("data.toml"))) == []


def test_settings_of_uploads_have_no_effect_without_a_repository_or_states():
    options = TrainNetworkOptions(async_upload=True, save_state_to_huggingface=True, huggingface_token="t")
    assert warnings_for(options) == [
        "--save_state_to_huggingface has no effect without --huggingface_repo_id",
        "--async_upload has no effect without --huggingface_repo_id",
        "--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end",
        "--huggingface_token has no effect without --huggingface_repo_id or --resume_from_huggingface",
    ]


def test_rank_and_alpha_have_no_effect_beside_those_of_a_file():
    options = TrainNetworkOptions(dim_from_weights=True, network_weights="a.pt", network_dim=4, network_alpha=2)
    assert warnings_for(options) == [
        "--network_dim has no effect beside --dim_from_weights",
        "--network_alpha has no effect beside --dim_from_weights",
    ]


def test_options_that_belong_to_another_one_are_warned_about_without_it():
    assert warnings_for(TrainNetworkOptions(dynamo_backend="eager", cpu_offload_checkpointing=True)) == [
        "--cpu_offload_checkpointing has no effect without --gradient_checkpointing",
        "--dynamo_backend has no effect without --torch_compile",
    ]
    belonging = dict(gradient_checkpointing=True, torch_compile=True)
    options = TrainNetworkOptions(dynamo_backend="eager", cpu_offload_checkpointing=True, **belonging)
    assert warnings_for(options) == []


@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        ({"huber_c": 0.3}, ["--huber_c has no effect without --loss_type huber or smooth_l1"]),
        (
            {"loss_type": "huber", "huber_c": 0.3, "huber_scale": 2},
            ["--huber_scale has no effect with --huber_sched"],
        ),
        ({"loss_type": "huber", "huber_schedule": "constant", "huber_scale": 2}, []),
        ({"multires_noise_discount": 0.5}, ["--multires_noise_discount has no effect without --multires_noise_iter"]),
        ({"min_timestep": 500, "max_timestep": 500}, ["--min_timestep 500 is not below --max_timestep 500"]),
        ({"lr_scheduler_power": 2, "lr_scheduler": "cosine"}, ["--lr_scheduler_power has no effect on --lr_scheduler"]),
        ({"lr_scheduler_power": 2, "lr_scheduler": "polynomial"}, []),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR"}, ["--lr_scheduler has no effect beside --lr_sch"]),
        ({"lr_scheduler": "piecewise_constant", "lr_warmup_steps": 5}, ["--lr_warmup_steps has no effect on --lr_sc"]),
        ({"sample_prompts": "a cat"}, ["--sample_prompts has no effect without --sample_at_first or"]),
        ({"sample_prompts": "a cat", "before_after": True}, []),
        (
            {"save_last_n_epochs": 2},
            ["--save_last_n_epochs has no effect without --save_every_n_epochs or --save_n"],
        ),
        ({"save_last_n_epochs": 2, "save_n_epoch_ratio": 2}, []),
        ({"save_last_n_steps": 0}, []),
        ({"training_comment": "a", "no_metadata": True}, ["--training_comment has no effect beside --no_metadata"]),
        ({"max_train_steps": 9, "max_train_epochs": 2}, ["--max_train_steps has no effect beside --max_train_epochs"]),
        ({"text_encoder_lr": 1, "network_train_unet_only": True}, ["--text_encoder_lr has no effect beside --netwo"]),
        ({"unet_lr": 1, "network_train_text_encoder_only": True}, ["--unet_lr has no effect beside --network_train"]),
        ({"save_every_n_epochs": 1, "save_n_epoch_ratio": 2}, ["--save_every_n_epochs has no effect beside --save_n"]),
        (
            {"sample_every_n_epochs": 1, "sample_every_n_steps": 2, "sample_prompts": "a cat"},
            ["--sample_every_n_steps has no effect beside --sample_every_n_epochs"],
        ),
        (
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
            ["--persistent_data_loader_workers has no effect without --max_data_loader_n_workers"],
        ),
        ({"vae_batch_size": 4}, ["--vae_batch_size has no effect without --cache_latents or --cache_latents_to_disk"]),
        ({"vae_batch_size": 4, "cache_latents_to_disk": True}, []),
        ({"metadata_title": "a", "save_model_as": "ckpt"}, ["--metadata_title: no effect, as --save_model_as ckpt"]),
    ],
)
def test_a_setting_that_another_one_makes_idle_is_said(given, warnings):
    found = warnings_for(TrainNetworkOptions(**given))
    assert len(found) == len(warnings) and all(map(str.startswith, found, warnings)), found


def test_a_first_step_starts_the_schedule_anew_and_counts_for_nothing_beside_a_state():
    (warning,) = warnings_for(TrainNetworkOptions(initial_step=5, lr_scheduler="cosine"))
    assert warning.startswith("--initial_step: the learning-rate schedule starts at its beginning")
    assert warnings_for(TrainNetworkOptions(initial_epoch=1, lr_scheduler="cosine")) == []
    assert warnings_for(TrainNetworkOptions(initial_step=5)) == []
    options = TrainNetworkOptions(initial_step=5, lr_scheduler="cosine", resume="state")
    assert warnings_for(options) == ["--initial_step has no effect beside --resume"]


def test_a_launcher_that_says_something_else_is_contradicted_in_one_line(monkeypatch):
    options = TrainNetworkOptions(mixed_precision="bf16", torch_compile=True, gradient_accumulation_steps=2)
    agreeing = {"MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "INDUCTOR", "GRADIENT_ACCUMULATION_STEPS": "2"}
    silent = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "GRADIENT_ACCUMULATION_STEPS": "1"}
    for environment in (agreeing, silent):
        for name, value in environment.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        assert launch_warnings(options) == []
    for name, value in agreeing.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert launch_warnings(TrainNetworkOptions()) == [
        "accelerate launch --mixed_precision bf16 has no effect: the script's own options say no",
        "accelerate launch --dynamo_backend inductor has no effect: the script's own options say no",
        "accelerate launch --gradient_accumulation_steps 2 has no effect: the script's own options say 1",
    ]


@pytest.mark.parametrize("engine", OTHER_ENGINES)
def test_a_launcher_that_splits_the_model_is_a_mistake(engine, monkeypatch):
    assert launch_problems() == []
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    (problem,) = launch_problems()
    assert "is not supported: use accelerate launch --multi_gpu" in problem


def test_log_with_tensorboard_has_an_effect():
    assert warnings_for(TrainNetworkOptions(log_with="tensorboard", logging_dir="logs")) == []


def test_two_kinds_of_attention_are_a_warning():
    (warning,) = warnings_for(TrainNetworkOptions(xformers=True, sdpa=True))
    assert warning.startswith("--xformers and --sdpa are both given")
