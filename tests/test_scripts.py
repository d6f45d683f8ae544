"""What all scripts around training share: flags of kohya's, help without torch, mistakes in a sentence."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.fields import REQUIRED, flags_of

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/data/cli"
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("", "tools", "networks", "finetune")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"^OPTIONS = ", path.read_text(encoding="utf-8"), re.MULTILINE)
)
KOHYAS = [
    pytest.param(script, entry, id=f"{script} {entry['dest']}")
    for script in SCRIPTS
    if (GOLDEN / script).with_suffix(".json").exists()
    for entry in json.loads((GOLDEN / script).with_suffix(".json").read_text(encoding="utf-8"))
]


def run(script: str, *arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys\n{prelude}\nsys.argv[0] = {script!r}\nrunpy.run_path({script!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )


def test_every_golden_file_belongs_to_a_script():
    scripts = {path.relative_to(GOLDEN).with_suffix(".py").as_posix() for path in GOLDEN.rglob("*.json")}
    assert scripts and scripts <= set(SCRIPTS)


@pytest.mark.parametrize(("script", "entry"), KOHYAS)
def test_it_takes_kohyas_flag_with_its_type_and_default(script: str, entry: dict):
    flag = flags_of(importlib.import_module(script.removesuffix(".py").replace("/", ".")).OPTIONS)[entry["dest"]]
    assert {*entry["flags"]} <= {flag.label, *flag.spellings}
    untyped = None if entry["nargs"] == 0 else "str"  # what argparse makes of a flag that names no type
    wanted = {"Path": "str", None: untyped}.get(entry["type"], entry["type"])
    assert {"bool": None, "path": "str", "prompts": "str"}.get(flag.kind, flag.kind) == wanted
    assert flag.is_list == (entry["nargs"] not in (None, 0))
    if not entry["required"]:
        assert flag.default in (entry["default"], REQUIRED)  # what kohya's script fails without may be required here
    assert [choice for choice in entry["choices"] or [] if choice is not None] == list(flag.choices or [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_ascii_and_needs_nothing_heavy(script: str):
    blocked = "for name in ('torch', 'diffusers', 'transformers', 'cv2'): sys.modules[name] = None"
    done = run(script, "--help", prelude=blocked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and done.stdout.isascii()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_a_sentence(script: str):
    done = run(script, "--no_such_flag_anywhere")
    assert done.returncode == 2
    assert "error: --no_such_flag_anywhere is not a flag of this script" in done.stderr
    assert "Traceback" not in done.stderr
