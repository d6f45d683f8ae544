"""Damaged and random input of every kind is taken or refused in a sentence: no other error, no hang, no stray file."""

import logging
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions
from library.dataset.dataset_config_keys import KEYS, check_document
from library.errors import UserError, one_line
from library.options.config_file import _to_toml, parse_toml
from library.options.convert import Mismatch, convert
from library.options.derived import network_arguments, parse_key_values
from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from library.training.prompts import checked, parse_line
from tests import fuzz

SECONDS_A_CASE = 60
FLAGS = flags_of(TrainNetworkOptions)


@contextmanager
def bounded_time() -> Iterator[None]:
    """Ends what takes too long, where the system can."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS_A_CASE} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_cases(kind: fuzz.Kind, folder: Path, name: str, num_cases: int) -> Counter[str]:
    """How many damaged files were taken and refused; an error says which case it was."""
    rng, whole, path, counts = random.Random(name), kind.whole(), folder / kind.file, Counter()
    for data in whole:
        path.write_bytes(data)
        kind.read(path)  # what is whole is taken
    for number in range(num_cases):
        data = fuzz.mutated(rng.choice(whole), rng)
        path.write_bytes(data)
        try:
            with bounded_time():
                kind.read(path)
            counts["accepted"] += 1
        except UserError as error:
            assert str(error)
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of {name}: {error!r}; the file was {data[:2000]!r}") from error
    return counts


@pytest.fixture
def case_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, for one kind of input, in which the process stands."""
    folder = tmp_path / "case"
    (folder / "data").mkdir(parents=True)
    for name in ("data/a", "data/b", "data/c"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # thousands of warnings
    return folder


def check_kind(name: str, folder: Path, num_cases: int) -> Counter[str]:
    kind = fuzz.KINDS[name]
    if name == "caption":
        Image.new("RGB", (64, 64)).save(folder / "picture.png")
    (folder / kind.file).parent.mkdir(exist_ok=True)
    allowed = {"data", "packs", "unet", "text_encoder", "scheduler", "picture.png", kind.file}
    counts = run_cases(kind, folder, name, num_cases)
    assert {path.name for path in folder.iterdir()} <= allowed
    assert [path.name for path in folder.parent.iterdir()] == ["case"], "nothing is written outside"
    return counts


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_damaged_files_are_taken_or_refused_in_a_sentence(name, case_folder):
    counts = check_kind(name, case_folder, num_cases=50)
    assert counts["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.KINDS)
def test_thousands_of_damaged_files_are_taken_or_refused_in_a_sentence(name, case_folder, capsys):
    counts = check_kind(name, case_folder, num_cases=1500)
    with capsys.disabled():
        print(f"\n{name}: {counts['accepted']} accepted, {counts['refused']} refused", end="")


# Values that no form of configuration is safe from.
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 1e308, -0.0])
texts = st.text(max_size=20) | st.sampled_from(["", "nan", "-1", "\x00", "../..", "9" * 5000, "\ud800", "1e999", "50%"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)


@quick
@given(st.sampled_from(sorted(FLAGS)), values)
def test_any_value_of_any_flag_is_converted_or_a_mismatch(name, value):
    try:
        convert(FLAGS[name], value)
    except Mismatch as mismatch:
        assert str(mismatch)


@quick
@given(
    st.dictionaries(st.sampled_from(sorted(KEYS)), values, max_size=4), st.sampled_from(["general", "datasets", "s"])
)
def test_any_table_of_a_dataset_configuration_is_checked(table, level):
    subset = {"image_dir": "data"} | (table if level == "s" else {})
    dataset = {"subsets": [subset]} | (table if level == "datasets" else {})
    document = {"datasets": [dataset], "general": table if level == "general" else {}}
    assert all(isinstance(problem, str) for problem in check_document(document))


@quick
@given(st.text(max_size=200))
def test_any_text_is_toml_or_a_sentence(text):
    try:
        assert isinstance(parse_toml("run.toml", text), dict)
    except UserError as error:
        assert str(error).startswith("run.toml")


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_a_text_that_is_written_to_a_configuration_is_read_as_it_was(text):
    assert parse_toml("run.toml", f"a = {_to_toml(text)}\nb = 1\n") == {"a": text, "b": 1}


@quick
@given(st.text(max_size=40), st.lists(st.tuples(st.sampled_from("whdslng"), texts), max_size=3))
def test_any_prompt_line_is_a_prompt_or_a_sentence(prompt, options):
    line = " ".join([prompt, *(f"--{letter} {value}" for letter, value in options)])
    try:
        (entry,) = checked([parse_line(line, "line 1")], "the text")
    except UserError:
        return
    assert 64 <= entry.width <= 16384 and entry.width % 8 == 0 and 1 <= entry.sample_steps <= 1000


@quick
@given(st.text(max_size=80), st.integers(0, 9), st.sampled_from(["", "|||", ",", "{"]), st.booleans())
def test_any_caption_is_processed(caption, keep_tokens, mark, shuffle):
    subset = SubsetOptions(
        image_dir=Path("data"), shuffle_caption=shuffle, keep_tokens=keep_tokens, keep_tokens_separator=mark,
        enable_wildcard=True, token_warmup_step=4, caption_tag_dropout_rate=0.3, secondary_separator=";",
    )  # fmt: skip
    made = process_caption(caption, subset, step=1, epoch=1, max_train_steps=9, rng=random.Random(0))
    assert isinstance(made, str)


@quick
@given(st.lists(texts | st.tuples(texts, texts).map("=".join), max_size=3))
def test_any_argument_lists_are_read_or_refused(items):
    for read in (lambda: parse_key_values(items, "optimizer_args"), lambda: network_arguments(Options(items))):
        try:
            assert isinstance(read(), dict)
        except UserError as error:
            assert str(error)


class Options:
    def __init__(self, network_args: list[str]):
        self.network_args = network_args


@settings(quick, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_any_text_is_one_line_for_a_message(text):
    assert len(one_line(text).splitlines()) <= 1
