"""Weights in captions and prompts are read as the WebUI and kohya read them."""

import pytest

from library.families.prompt_weights import parse_weights

READINGS = [
    ("", []),
    ("a cat", [("a cat", 1.0)]),
    # brackets and numbers
    ("(cat)", [("cat", 1.1)]),
    ("[cat]", [("cat", 1 / 1.1)]),
    ("(cat:1.3)", [("cat", 1.3)]),
    ("(cat:.5)", [("cat", 0.5)]),
    ("(cat:2.)", [("cat", 2.0)]),
    ("(cat:-1)", [("cat", -1.0)]),
    ("(cat:+1.2)", [("cat", 1.2)]),
    ("a (cat:1.3) on a mat", [("a ", 1.0), ("cat", 1.3), (" on a mat", 1.0)]),
    # nesting multiplies
    ("((cat))", [("cat", 1.1 * 1.1)]),
    ("[[cat]]", [("cat", 1 / 1.1 / 1.1)]),
    ("(a (cat:2) b:3)", [("a ", 3.0), ("cat", 6.0), (" b", 3.0)]),
    ("([cat]:2)", [("cat", 2 / 1.1)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
    # neighbours of one weight are one piece
    ("(a)(b)c", [("ab", 1.1), ("c", 1.0)]),
    ("(a:1)b", [("ab", 1.0)]),
    # escapes
    (r"saber \(fate\)", [("saber (fate)", 1.0)]),
    (r"\[cat\] \\", [(r"[cat] " + "\\", 1.0)]),
    (r"(saber \(fate\):1.2)", [("saber (fate)", 1.2)]),
    ("a \\ cat", [("a  cat", 1.0)]),
    ("a\\", [("a", 1.0)]),
    # not balanced
    ("a (cat", [("a ", 1.0), ("cat", 1.1)]),
    ("a [cat", [("a ", 1.0), ("cat", 1 / 1.1)]),
    ("a ((cat:1.5) dog", [("a ", 1.0), ("cat", 1.5 * 1.1), (" dog", 1.1)]),
    ("cat) dog", [("cat) dog", 1.0)]),
    ("cat] :)", [("cat] :)", 1.0)]),
    ("cat:1.3)", [("cat:1.3)", 1.0)]),
    ("()", []),
    # what only looks like a weight
    ("[cat:0.5]", [("cat:0.5", 1 / 1.1)]),
    ("[cat:dog:0.5]", [("cat:dog:0.5", 1 / 1.1)]),
    ("cat:1.3", [("cat:1.3", 1.0)]),
    ("(cat: 1.3)", [("cat: 1.3", 1.1)]),
    ("(cat:1.2.3)", [("cat:1.2.3", 1.1)]),
    ("(cat:..)", [("cat:..", 1.1)]),
    ("(12:30:1.5)", [("12:30", 1.5)]),
    ("(一只猫:1.2)，狗", [("一只猫", 1.2), ("，狗", 1.0)]),
]


@pytest.mark.parametrize(("text", "pieces"), READINGS, ids=[text for text, _ in READINGS])
def test_text_is_read_as(text, pieces):
    found = parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_square_brackets_undo_round_ones():
    ((words, weight),) = parse_weights("([cat])")
    assert words == "cat" and weight == pytest.approx(1)


def test_a_long_row_of_brackets_is_read_at_once():
    pieces = parse_weights("(" * 5000 + "cat")
    assert pieces == [("cat", pytest.approx(1.1**5000))]
