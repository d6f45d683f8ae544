"""Captions are cleaned by rules, line by line, and what they were is kept."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.clean_captions_and_tags import main as clean_metadata
from library.captioning.cleaning import Rules, clean_sentence, clean_tags, without_lettering
from library.errors import UserError
from tools.clean_captions import main

RULES = """
drop = ["brown eyes", "* hair"]
keep = ["wet hair"]
first = ["1girl", "solo"]
add = ["miko style"]
sort = true
[synonyms]
"grey sky" = "gray sky"
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures with captions, one of them in a folder below."""
    folder = tmp_path / "猫 cats"
    texts = {"a": "solo, Long_hair, smile, 1girl, smile ,, brown_eyes", "b": "already, clean", "in/c": "x, x\ny, y"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    return folder


def texts(folder: Path) -> list[str]:
    return [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("a", "b", "in/c")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("big_hat, cat,  ^_^, :d, :D, , Big hat", "big hat, cat, ^_^, :d, :D"),
        ("white shirt, shirt, hair ornament, star hair ornament, hair", "white shirt, star hair ornament, hair"),
        ("white hair ornament, ornament holder", "white hair ornament, ornament holder"),
        ("2girls, red hair, blue hair, long hair, blue eyes, ponytail, side braid", "2girls, long hair, blue eyes"),
        ("1girl, red hair, blue hair, blue eyes, red eyes", "1girl, red hair, blue hair, blue eyes, red eyes"),
        ("multiple boys, long hair, short hair, red hair", "multiple boys, red hair"),
        ("cat, rating:safe, dog", "cat, dog"),
        ("草, 草, 猫", "草, 猫"),
    ],
)
def test_tags_without_a_rules_file(before, after):
    assert clean_tags(before, Rules()) == after
    assert clean_tags(after, Rules()) == after


def test_rules_drop_traits_order_and_replace(folder, tmp_path, capsys):
    (tmp_path / "rules.toml").write_text(RULES, encoding="utf-8")
    (folder / "b.txt").write_text("wet hair, 1girl, grey_sky, [x] hair", encoding="utf-8")
    before = texts(folder)
    words = [str(folder), "--rules", str(tmp_path / "rules.toml"), "--recursive"]
    main([*words, "--dry_run"])
    assert texts(folder) == before
    assert "- solo, Long_hair, smile, 1girl, smile ,, brown_eyes\n+ miko style, 1girl, solo, smile\n" in (
        shown := capsys.readouterr().out
    )
    assert shown.endswith("3 of 3 captions would change\n")
    main(words)
    assert texts(folder) == [
        "miko style, 1girl, solo, smile\n",
        "miko style, 1girl, gray sky, wet hair\n",
        "miko style, x\nmiko style, y\n",
    ]
    (backup,) = folder.glob(".captions_before_cleaning-*")
    assert [text.strip() for text in texts(backup)] == [text.strip() for text in before]
    main(words)  # once more changes nothing, and keeps nothing
    assert capsys.readouterr().out.endswith("0 of 3 captions changed\n")
    assert len(list(folder.glob(".captions_before_cleaning-*"))) == 1


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("dropp = []", "there is no rule dropp"),
        ("drop = 'x'", "drop must be a list of texts, got 'x'"),
        ("sort = 1", "sort must be true or false, got 1"),
    ],
)
def test_mistakes_in_rules_are_sentences_and_nothing_is_written(rules, sentence, folder, tmp_path):
    (tmp_path / "rules.toml").write_text(rules, encoding="utf-8")
    before = texts(folder)
    with pytest.raises(UserError, match=sentence):
        main([str(folder), "--rules", str(tmp_path / "rules.toml")])
    assert texts(folder) == before


def test_sentences():
    assert clean_sentence("an anime  girl girl in a cartoon hat") == "an girl in a cartoon hat"
    assert without_lettering('a woman with the words "good day" on it') == "a woman"
    assert without_lettering("a man holding a sign that says hello") == "a man holding"
    assert without_lettering("a cat with the ball") == "a cat with the ball"


def test_a_metadata_file_is_cleaned_into_another(tmp_path):
    entries = {"a.png": {"tags": "long_hair, long hair", "caption": "an anime girl", "image_size": [8, 8]}, "b.png": {}}
    (tmp_path / "in.json").write_text(json.dumps(entries), encoding="utf-8")
    clean_metadata([str(tmp_path / "in.json"), str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {
        "a.png": {"tags": "long hair", "caption": "an girl", "image_size": [8, 8]},
        "b.png": {},
    }
