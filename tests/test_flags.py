"""The flags are kohya's, and reading them needs nothing heavy."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from library.options.fields import OptionGroup, flags_of
from library.options.groups import TrainNetworkOptions
from library.options.honoured import NOT_HONOURED, REFUSED

ROOT = Path(__file__).parent.parent
KOHYA = json.loads((ROOT / "tests/data/kohya_train_network_flags.json").read_text(encoding="utf-8"))
OURS = {
    "base_quantization", "before_after", "blocks_to_swap", "cover_image", "cuda_graphs", "deterministic", "dry_run",
    "ema", "ema_decay", "fast_jpeg", "fused_kernels", "grid_after_training", "latent_cache", "max_skipped_steps",
    "no_onednn", "no_report", "strict_config",
}  # fmt: skip
# kohya's too, of sdxl_train_network.py; here one script trains what the checkpoint is
SDXL = {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "disable_mmap_load_safetensors"}
FLAGS = flags_of(TrainNetworkOptions)
GROUPS = [group for group in TrainNetworkOptions.__mro__ if issubclass(group, OptionGroup) and group is not OptionGroup]


def kohya_type(flag):
    if flag.name == "dataset_config":
        return "Path"
    return {"bool": None, "path": "str", "prompts": "str"}.get(flag.kind, flag.kind)


def test_flags_are_kohyas_and_those_of_ours():
    assert set(FLAGS) == {entry["dest"] for entry in KOHYA} | OURS | SDXL
    assert all((FLAGS[name].kind, FLAGS[name].default) == ("bool", False) for name in SDXL)


@pytest.mark.parametrize("entry", KOHYA, ids=lambda entry: entry["dest"])
def test_flag_has_kohyas_type_default_and_choices(entry):
    flag = FLAGS[entry["dest"]]
    assert entry["flags"] == [f"--{flag.name}"]
    assert kohya_type(flag) == entry["type"]
    assert (flag.default, type(flag.default)) == (entry["default"], type(entry["default"]))
    kohya_choices = [choice for choice in entry["choices"] or [] if choice is not None]
    assert list(flag.choices or []) == kohya_choices
    assert entry["nargs"] == ("*" if flag.is_list else 0 if flag.kind == "bool" else None)
    assert entry["action"] == ("store_true" if flag.kind == "bool" else "store")


def test_no_option_is_declared_in_two_groups():
    declared = [name for group in GROUPS for name in vars(group).get("__annotations__", {}) if name in FLAGS]
    assert len(declared) == len(set(declared))


def test_every_field_but_sources_is_a_flag():
    assert {item.name for item in fields(TrainNetworkOptions)} - set(FLAGS) == {"sources"}


def test_every_flag_has_a_help_sentence_in_ascii():
    assert all(flag.help and flag.help.isascii() for flag in FLAGS.values())


def test_flags_not_honoured_exist_and_refused_ones_are_among_them():
    assert set(NOT_HONOURED) <= set(FLAGS)
    assert set(NOT_HONOURED) >= REFUSED


def test_help_is_grouped_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from library.options.cli import read_options\n"
        "from library.options.groups import TrainNetworkOptions\n"
        "try:\n"
        "    read_options(TrainNetworkOptions, ['--help'])\n"
        "finally:\n"
        "    print('HEAVY', [name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    for group in GROUPS[1:]:
        assert f"\n{group.__doc__}:" in done.stdout
    assert all(f"--{name}" in done.stdout for name in FLAGS)


ALWAYS_IN_FORCE = {"sdpa", "console_log_simple", "skip_until_initial_step"}  # given or not, this is what happens


def test_every_flag_is_acted_on_or_listed_as_without_effect():
    root = Path(__file__).parents[1]
    tables = ("groups.py", "honoured.py")
    files = [
        path for path in (root / "library").rglob("*.py") if path.name not in tables and path.parent.name != "imports"
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in [*files, root / "train_network.py"])
    families_of_names = {"metadata_": 'f"metadata_{', "save_last_n_": 'f"save_last_n_{'}  # read by a computed name
    for name in flags_of(TrainNetworkOptions):
        computed = any(name.startswith(prefix) and pattern in code for prefix, pattern in families_of_names.items())
        is_read = re.search(rf'\.{name}\b|"{name}"', code) or computed or name in ALWAYS_IN_FORCE
        assert is_read or name in NOT_HONOURED, name
