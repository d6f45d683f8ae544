"""train.sh and train_by_toml.sh pass on what their variables say; the Windows twins say the same."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toml

from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from tests import tiny
from tests.results import metadata_of

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("train", "train_by_toml")
SHELL_VALUE = r"""(?:\(\)|"[^"]*"|\S+)"""
needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="the shell scripts are for Linux and macOS")

# variable -> its value here, and the flag that must arrive with the value it must have
TRAIN_VARIABLES = {
    "pretrained_model": ("底 模/a b.safetensors", "pretrained_model_name_or_path"),
    "is_v2_model": (1, "v2"),
    "parameterization": (1, "v_parameterization"),
    "vae": ("my vae.pt", "vae"),
    "clip_skip": (2, "clip_skip"),
    "train_data_dir": ("图 片", "train_data_dir"),
    "reg_data_dir": ("reg *", "reg_data_dir"),
    "caption_extension": (".cap", "caption_extension"),
    "shuffle_caption": (1, "shuffle_caption"),
    "keep_tokens": (3, "keep_tokens"),
    "max_token_length": (225, "max_token_length"),
    "resolution": ("640,448", "resolution"),
    "enable_bucket": (1, "enable_bucket"),
    "min_bucket_reso": (128, "min_bucket_reso"),
    "max_bucket_reso": (768, "max_bucket_reso"),
    "cache_latents": (1, "cache_latents"),
    "persistent_data_loader_workers": (1, "persistent_data_loader_workers"),
    "network_module": ("networks.other", "network_module"),
    "network_weights": ("旧 的.safetensors", "network_weights"),
    "network_dim": (8, "network_dim"),
    "network_alpha": (4, "network_alpha"),
    "dropout": (0.1, "network_dropout"),
    "train_unet_only": (1, "network_train_unet_only"),
    "train_text_encoder_only": (1, "network_train_text_encoder_only"),
    "optimizer_type": ("Lion", "optimizer_type"),
    "lr": (3e-4, "learning_rate"),
    "unet_lr": (2e-4, "unet_lr"),
    "lr_scheduler": ("cosine_with_restarts", "lr_scheduler"),
    "lr_warmup_steps": (10, "lr_warmup_steps"),
    "lr_restart_cycles": (3, "lr_scheduler_num_cycles"),
    "batch_size": (5, "train_batch_size"),
    "max_train_epochs": (7, "max_train_epochs"),
    "noise_offset": (0.05, "noise_offset"),
    "min_snr_gamma": (5, "min_snr_gamma"),
    "seed": (0, "seed"),
    "mixed_precision": ("fp16", "mixed_precision"),
    "gradient_checkpointing": (1, "gradient_checkpointing"),
    "lowram": (1, "lowram"),
    "output_dir": ("out put", "output_dir"),
    "output_name": ("丹", "output_name"),
    "save_model_as": ("pt", "save_model_as"),
    "save_precision": ("bf16", "save_precision"),
    "save_every_n_epochs": (3, "save_every_n_epochs"),
    "save_state": (1, "save_state"),
    "resume": ("a-state", "resume"),
    "sample_prompts": ("提示 词.txt", "sample_prompts"),
    "sample_every_n_epochs": (4, "sample_every_n_epochs"),
    "logging_dir": ("l o g s", "logging_dir"),
    "log_with": ("wandb", "log_with"),
    "log_tracker_name": ("name", "log_tracker_name"),
}
LISTS = {"text_encoder_lr": 0, "conv_dim": 2, "conv_alpha": 1, "algo": "loha"}
ARRAYS = {"network_args": ("a=1", "b=x y"), "optimizer_args": ("weight_decay=0.1", "betas=0.9,0.99")}
OF_THE_LAUNCH = {"multi_gpu", "num_processes", "gpu_ids", "utf8"}
SECRET = {"wandb_api_key"}  # --output_config never writes it


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the checkout, as far as training needs it, in a folder with a space and Chinese in its name."""
    folder = tmp_path / "炼丹 房"
    (folder / "tools").mkdir(parents=True)
    for name in ("train_network.py", "train.sh", "train_by_toml.sh", "tools/launch.sh"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("library", "networks", "config_examples"):
        (folder / name).symlink_to(ROOT / name)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


def edit(script: Path, **values: object) -> None:
    """Give variables at the top of a launcher other values, as its user would."""
    text = script.read_text(encoding="utf-8")
    for name, value in values.items():
        written = f"({' '.join(map(quoted, value))})" if isinstance(value, tuple) else quoted(value)
        text, count = re.subn(rf"^{name}={SHELL_VALUE}", f"{name}={written}", text, flags=re.M)
        assert count == 1, name
    script.write_text(text, encoding="utf-8")


def quoted(value: object) -> str:
    return f'"{value}"'


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher from another folder than its own."""
    return subprocess.run(
        ["bash", str(script), *arguments], cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def options_of(script: Path, *arguments: str) -> dict[str, object]:
    """The options that arrive at train_network.py, in so far as they differ from the defaults."""
    written = run(script, *arguments, "--config_file", "arrived.toml", "--output_config")
    assert written.returncode == 0, written.stderr
    return toml.loads((script.parent / "arrived.toml").read_text(encoding="utf-8"))


@needs_bash
def test_every_variable_of_train_sh_arrives(house):
    values = {name: value for name, (value, _) in TRAIN_VARIABLES.items()}
    edit(house / "train.sh", **values, **LISTS, **ARRAYS)
    expected = {flag: value for value, flag in TRAIN_VARIABLES.values()}
    expected |= {
        "text_encoder_lr": [0],
        "network_args": ["a=1", "b=x y", "conv_dim=2", "conv_alpha=1", "algo=loha"],
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"],
        "train_batch_size": 6,
    }
    assert options_of(house / "train.sh", "--train_batch_size", "6") == expected


@needs_bash
def test_empty_values_and_zero_switches_of_train_sh_do_not_arrive(house):
    zero = [name for name, value in variables_of("train.sh").items() if value in ("0", "1")]
    switches = {name: 0 for name in zero if switch_pattern(name).search((ROOT / "train.sh").read_text("utf-8"))}
    assert len(switches) == 11
    others = {name: "" for name in variables_of("train.sh") if name not in {*switches, *ARRAYS, *OF_THE_LAUNCH}}
    edit(house / "train.sh", **switches, **others)
    assert options_of(house / "train.sh") == {}


@needs_bash
def test_train_sh_trains(house, tiny_sd2_file):
    tiny.write_pictures(house / "图 片")
    edit(
        house / "train.sh", pretrained_model=tiny_sd2_file, train_data_dir="图 片", is_v2_model=1, parameterization=1,
        clip_skip=2, lowram=0, resolution="96,96", min_bucket_reso=64, max_bucket_reso=128, network_dim=4, conv_dim=2,
        conv_alpha=1, keep_tokens=2, min_snr_gamma=5, max_train_epochs="", optimizer_type="AdamW", sample_prompts="",
        mixed_precision="no", output_name="小 丹",
    )  # fmt: skip
    ended = run(house / "train.sh", "--max_train_steps", "2")
    assert ended.returncode == 0, ended.stderr
    metadata = metadata_of(house / "output" / "小 丹.safetensors")
    names = ("ss_clip_skip", "ss_keep_tokens", "ss_min_snr_gamma", "ss_lowram", "ss_base_model_version", "ss_steps")
    assert [metadata[name] for name in names] == ["2", "2", "5.0", "False", "sd_v2_v", "2"]
    assert '"conv_dim": "2"' in metadata["ss_network_args"]


@pytest.fixture
def by_toml(house, tiny_file):
    """Run train_by_toml.sh on a file of two keys, with the flags of a toy run behind it; returns its messages."""

    def by_toml(*flags: str, multi_gpu: int = 0, **environment: str) -> str:
        tiny.write_pictures(house / "图 片")
        words = tiny.arguments(
            tiny_file, Path("图 片"), Path("out"), output_name=None, max_train_epochs=None, max_train_steps=2
        )
        edit(house / "train_by_toml.sh", config_file="我的.toml", multi_gpu=multi_gpu)
        (house / "我的.toml").write_text('max_train_steps = 9\noutput_name = "x"\n', encoding="utf-8")
        ended = run(house / "train_by_toml.sh", *words, *flags, **environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout + ended.stderr

    return by_toml


@needs_bash
def test_train_by_toml_sh_passes_on_its_file_and_the_flags_behind_it(by_toml, house):
    assert "2 steps in all" in by_toml("--debug_dataset")
    assert [path.name for path in (house / "out").iterdir()] == ["x-dataset-000001.png"]


@needs_bash
@pytest.mark.slow
def test_train_by_toml_sh_trains_in_two_processes(by_toml, house):
    assert "x 2 processes" in by_toml(multi_gpu=1, ACCELERATE_USE_CPU="true")
    assert metadata_of(house / "out" / "x.safetensors")["ss_steps"] == "2"


MISTAKES = {
    "a switch": (dict(lowram=2), "error: --lowram must be 1 or 0, got 2"),
    "several GPUs": (dict(multi_gpu="yes"), "error: multi_gpu must be 1 or 0, got yes"),
    "a value": (dict(network_dim="eight"), "error: --network_dim must be a whole number, got 'eight'"),
}


@needs_bash
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_its_sentence_and_exit_code_2(mistake, house):
    values, sentence = MISTAKES[mistake]
    edit(house / "train.sh", **values)
    ended = run(house / "train.sh")
    assert (ended.returncode, sentence in ended.stderr.splitlines()) == (2, True), ended.stderr


@needs_bash
@pytest.mark.parametrize("name", LAUNCHERS)
def test_without_an_environment_it_says_how_to_make_it(name, house):
    shutil.rmtree(house / ".venv")
    ended = run(house / f"{name}.sh")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: there is no .venv here: make it with bash tools/install.sh (or bash quickstart.sh)\n"


def variables_of(name: str) -> dict[str, str]:
    """The variables at the top of a launcher with their values, written as in a shell."""
    text = (ROOT / name).read_text(encoding="utf-8-sig").partition("# -----------")[0]
    found = re.findall(rf"^\$?(\w+) ?= ?@?({SHELL_VALUE})", text, flags=re.M)
    return dict(found)


def switch_pattern(variable: str) -> re.Pattern[str]:
    return re.compile(rf'^switch \w+ "\${variable}"$', flags=re.M)


def calls_of(name: str) -> list[tuple[str, str, str]]:
    """("option" or "switch", flag, variable) of every line of a launcher that makes a flag of a variable."""
    text = (ROOT / name).read_text(encoding="utf-8-sig")
    found = re.findall(r"^(?:Add-)?(option|switch) (\w+) \"?\$\{?(\w+)", text, flags=re.M | re.I)
    return [(kind.lower(), flag, variable) for kind, flag, variable in found]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_both_shells_have_the_same_variables_and_make_the_same_flags_of_them(name):
    variables = variables_of(f"{name}.sh")
    assert variables == variables_of(f"{name}.ps1") and len(variables) >= 5
    calls = calls_of(f"{name}.sh")
    assert calls == calls_of(f"{name}.ps1")
    into_lists = {"conv_dim", "conv_alpha", "algo"} & variables.keys()
    assert {variable for *_, variable in calls} | into_lists | (OF_THE_LAUNCH & variables.keys()) == variables.keys()
    flags = flags_of(TrainNetworkOptions)
    assert [(flag, kind) for kind, flag, _ in calls if (flags[flag].kind == "bool") != (kind == "switch")] == []


def test_the_table_of_this_test_covers_every_variable():
    tested = {*TRAIN_VARIABLES, *LISTS, *ARRAYS, *OF_THE_LAUNCH, *SECRET} - {"utf8"}
    assert tested == variables_of("train.sh").keys()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_windows_reads_the_files_in_their_encoding(name):
    powershell, batch = (ROOT / f"{name}.ps1").read_bytes(), (ROOT / f"{name}.bat").read_bytes()
    assert powershell.startswith(b"\xef\xbb\xbf") and "变量" in powershell.decode("utf-8-sig")
    assert batch.isascii() and f"{name}.ps1" in batch.decode("ascii")
    assert (ROOT / "tools" / "launch.ps1").read_bytes().isascii()
    attributes = subprocess.run(
        ["git", "check-attr", "eol", "--", f"{name}.ps1", f"{name}.bat", f"{name}.sh"], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    if attributes.returncode == 0:
        assert re.findall(r"eol: (\w+)", attributes.stdout) == ["lf", "crlf", "lf"]
