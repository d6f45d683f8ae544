"""Sample prompts: lines with options, or the same as TOML or JSON; a mistake is named with file and line."""

import json

import pytest

from library.errors import UserError
from library.training.prompts import SamplePrompt, prompts_of, read_prompts


def read(tmp_path, text: str, suffix: str = ".txt") -> list[SamplePrompt]:
    path = tmp_path / f"prompts{suffix}"
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def mistake(tmp_path, text: str, suffix: str = ".txt") -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, suffix)
    assert str(tmp_path / f"prompts{suffix}") in str(caught.value)
    return str(caught.value)


def test_line_alone_is_a_prompt_with_the_defaults(tmp_path):
    assert read(tmp_path, "a cat, 7 dogs\n") == [
        SamplePrompt("a cat, 7 dogs", "", 512, 512, 30, 7.5, seed=None, sample_sampler=None, enum=0)
    ]


def test_line_with_all_options(tmp_path):
    line = "a cat --n blurry, dark --w 640 --h 768 --d 12 --l 6.5 --s 28 --ss euler_a"
    assert read(tmp_path, line) == [SamplePrompt("a cat", "blurry, dark", 640, 768, 28, 6.5, 12, "euler_a", 0)]


def test_letters_of_options_may_be_capital_and_the_last_of_two_counts(tmp_path):
    (prompt,) = read(tmp_path, "a cat --W 128 --D 5 --d 6")
    assert (prompt.width, prompt.seed) == (128, 6)


def test_options_of_other_model_families_are_passed_over(tmp_path):
    (prompt,) = read(tmp_path, "a cat --g 3.5 --cn pose.png --ctr 0.2 --rcfg 1 --fs 3.0 --d 4")
    assert prompt == SamplePrompt("a cat", seed=4)


def test_keys_of_other_model_families_are_passed_over_and_said(tmp_path, caplog):
    (prompt,) = read(tmp_path, '[{"prompt": "a cat", "guidance_scale": 3.5}]', ".json")
    assert prompt == SamplePrompt("a cat") and "guidance_scale has no meaning for this model" in caplog.text


def test_blank_lines_and_comments_are_passed_over_and_prompts_are_numbered(tmp_path):
    prompts = read(tmp_path, "# drawn every epoch\n\na cat\n   \na dog --d 1\n")
    assert [(prompt.prompt, prompt.enum) for prompt in prompts] == [("a cat", 0), ("a dog", 1)]


def test_dashes_inside_words_belong_to_the_prompt(tmp_path):
    assert read(tmp_path, "a black-and--white cat")[0].prompt == "a black-and--white cat"


def test_prompts_in_any_script_and_with_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff一只猫 --n 模糊\r\n".encode())
    assert read_prompts(path) == [SamplePrompt("一只猫", "模糊")]


@pytest.mark.parametrize(
    ("given", "used"), [("64", 64), ("8", 64), ("0", 64), ("100", 96), ("767", 760), ("768", 768), ("512.7", 512)]
)
def test_sizes_are_rounded_down_to_multiples_of_8_from_64_on(given, used, tmp_path):
    (prompt,) = read(tmp_path, f"a cat --w {given} --h {given}")
    assert (prompt.width, prompt.height) == (used, used)


@pytest.mark.parametrize(("given", "used"), [("0", 1), ("1", 1), ("1000", 1000), ("5000", 1000)])
def test_steps_are_kept_between_1_and_1000(given, used, tmp_path):
    assert read(tmp_path, f"a cat --s {given}")[0].sample_steps == used


@pytest.mark.parametrize(("given", "used"), [("7", 7.0), ("1.25", 1.25), (".5", 0.5), ("7.", 7.0), ("7.5.1", 7.5)])
def test_scale_is_the_number_that_is_there(given, used, tmp_path):
    assert read(tmp_path, f"a cat --l {given}")[0].scale == used


def test_option_that_is_not_known_is_named_with_its_line(tmp_path):
    sentence = mistake(tmp_path, "a cat\n# a remark\na dog --q 5\n")
    assert "line 3" in sentence and "--q" in sentence and "w, h, d, s, l, n, ss" in sentence


@pytest.mark.parametrize("option", ["--w wide", "--d -1", "--l .", "--s", "--l -3", "--n"])
def test_value_that_does_not_fit_is_named_with_its_line(option, tmp_path):
    sentence = mistake(tmp_path, f"a cat\na dog {option}\n")
    assert "line 2" in sentence and option.split()[0] in sentence


@pytest.mark.parametrize(("suffix", "text"), [(".txt", "# nothing\n"), (".json", "[]"), (".toml", "")])
def test_file_without_prompts_is_a_mistake(suffix, text, tmp_path):
    assert "has no prompts" in mistake(tmp_path, text, suffix)


ALL_KEYS = {
    "prompt": "a cat",
    "negative_prompt": "blurry",
    "width": 640,
    "height": 770,
    "sample_steps": 28,
    "scale": 6.5,
    "seed": 12,
    "sample_sampler": "euler_a",
}
ALL_KEYS_READ = SamplePrompt("a cat", "blurry", 640, 768, 28, 6.5, 12, "euler_a", 0)


def test_json_has_lines_and_tables(tmp_path):
    text = json.dumps([ALL_KEYS, "a dog --d 3", {"prompt": "a cow", "guidance_scale": 3.5}])
    assert read(tmp_path, text, ".json") == [
        ALL_KEYS_READ,
        SamplePrompt("a dog", seed=3, enum=1),
        SamplePrompt("a cow", enum=2),
    ]


def test_toml_has_subsets_that_go_before_what_they_share(tmp_path):
    shared = "\n".join(f"{key} = {json.dumps(value)}" for key, value in ALL_KEYS.items() if key != "prompt")
    text = f'[prompt]\n{shared}\n[[prompt.subset]]\nprompt = "a cat"\n[[prompt.subset]]\nprompt = "a dog"\nseed = 1\n'
    first, second = read(tmp_path, text, ".toml")
    assert first == ALL_KEYS_READ
    assert (second.prompt, second.seed, second.width, second.enum) == ("a dog", 1, 640, 1)


@pytest.mark.parametrize(
    ("suffix", "text", "words"),
    [
        (".json", '["a cat"', "cannot be read"),
        (".json", '[{"prompt": "a cat", "widht": 64}]', "unknown key widht"),
        (".json", '[{"width": 64}]', "an entry has no prompt"),
        (".toml", "[prompt", "not valid TOML"),
        (".toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\ncolour = 1', "unknown key colour"),
        (".json", '["a cat --w wide"]', "--w cannot be 'wide'"),
    ],
)
def test_mistakes_in_toml_and_json_are_named(suffix, text, words, tmp_path):
    assert words in mistake(tmp_path, text, suffix)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", '{"prompt": "a"}', "list of texts"),
        ("p.json", "5", "list of texts"),
        ("p.json", '[{"prompt": "a", "width": "512"}]', "width must be a whole number, got '512'"),
        ("p.json", '[{"prompt": null}]', "prompt must be text"),
        ("p.json", '[{"prompt": "a", "seed": 1.5}]', "seed must be a whole number"),
        ("p.toml", 'prompt = "a"', r"table \[prompt\]"),
        ("p.txt", "a --d 99999999999999999999999", "seed must be between"),
    ],
)
def test_entries_of_the_wrong_kind_are_named(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        read_prompts(tmp_path / name)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="not in UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_prompts_may_stand_in_the_option_itself(tmp_path):
    assert prompts_of("a cat --w 64\n# not this one\n\na dog.png --d 5") == [
        SamplePrompt("a cat", width=64),
        SamplePrompt("a dog.png", seed=5, enum=1),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("a cat\na dog --q 5", "the text, line 2: there is no option --q"), ("# no", "has no prompts")],
)
def test_mistakes_in_prompts_without_a_file_are_named(text, sentence):
    with pytest.raises(UserError, match=sentence):
        prompts_of(text)


def test_the_ending_of_a_prompt_file_may_be_in_capitals(tmp_path):
    (tmp_path / "P.TXT").write_text("a cat", encoding="utf-8")
    assert prompts_of(str(tmp_path / "P.TXT")) == [SamplePrompt("a cat")]
