"""How scripts end: a mistake in its own words and with 2, a bug with 1 and the traceback in a file."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from library.errors import UserError, counted, quoted_list, run_script

ROOT = Path(__file__).parents[1]


@pytest.fixture
def end_of(capsys, monkeypatch, tmp_path):
    """Exit code and standard error of a main function that raises; log files go to tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(error: BaseException) -> tuple[int, str]:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            run_script(main)
        return caught.value.code, capsys.readouterr().err

    return run


def test_script_that_ends_well_returns():
    calls = []
    run_script(lambda: calls.append(1))
    assert calls == [1]


def test_mistakes_end_in_their_sentences_and_2(end_of, tmp_path):
    code, text = end_of(UserError("--a must be 1, got 2", "--b: 猫.png is missing"))
    assert (code, text) == (2, "error: --a must be 1, got 2\nerror: --b: 猫.png is missing\n")
    assert not list(tmp_path.iterdir())


def test_bug_ends_in_one_line_the_path_of_its_traceback_and_1(end_of, tmp_path):
    code, text = end_of(RuntimeError("something broke\nat length"))
    assert code == 1
    assert text.startswith("error: RuntimeError: something broke\n")
    assert "Traceback" not in text and "at length" not in text
    (log,) = tmp_path.iterdir()
    assert str(log) in text
    written = log.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in written and "at length" in written


def test_bug_without_words_is_named_by_its_class(end_of):
    assert end_of(KeyError())[1].startswith("error: KeyError: no message")


def test_value_error_that_is_not_ours_is_a_bug(end_of):
    assert end_of(ValueError("from some library"))[0] == 1


def test_ctrl_c_ends_in_130_without_a_traceback(end_of):
    assert end_of(KeyboardInterrupt()) == (130, "stopped by Ctrl-C\n")


def test_script_that_exits_by_itself_keeps_its_code(end_of, tmp_path):
    assert end_of(SystemExit(0)) == (0, "")
    assert not list(tmp_path.iterdir())


def test_problems_of_a_mistake_are_its_lines():
    assert str(UserError("a", "b")) == "a\nb"
    assert UserError("a", "b").problems == ["a", "b"]
    assert isinstance(UserError("a"), ValueError)


def test_long_lists_are_cut_with_the_number_of_the_rest():
    assert quoted_list(["a", "b"]) == "a, b"
    assert quoted_list(list("abcde"), limit=2) == "a, b and 3 more"
    assert quoted_list(list("ab"), limit=2) == "a, b"


def test_one_thing_is_not_plural():
    assert [counted(number, "picture") for number in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
    assert [counted(number, "batch", "batches") for number in (1, 2)] == ["1 batch", "2 batches"]


def test_train_network_says_all_that_is_wrong_without_a_traceback(tmp_path):
    argv = ["--pretrained_model_name_or_path", str(tmp_path / "猫.safetensors"), "--network_dim", "0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_network.py"), *argv], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) >= 4 and all(line.startswith("error: --") for line in lines)
    named = {re.match(r"error: --(\w+)", line)[1] for line in lines}
    assert named >= {"network_dim", "train_data_dir", "output_dir", "resolution"}
