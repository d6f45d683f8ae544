import json
import random
from pathlib import Path

import pytest

from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions

GOLDEN = json.loads((Path(__file__).parent / "data/bucketing_and_caption_golden.json").read_text(encoding="utf-8"))


def processed(caption, step=0, epoch=1, max_train_steps=100, seed=0, **options):
    return process_caption(
        caption,
        SubsetOptions(image_dir=Path("x"), **options),
        step=step,
        epoch=epoch,
        max_train_steps=max_train_steps,
        rng=random.Random(seed),
    )


@pytest.mark.parametrize("case", GOLDEN["process_caption"], ids=lambda case: f"{case['caption']}-{case['options']}")
def test_caption_is_kohyas(case):
    caption = processed(
        case["caption"],
        case["step"],
        case["epoch"],
        case["max_train_steps"],
        case["python_random_seed"],
        **case["options"],
    )
    assert caption == case["result"]


def test_without_options_a_caption_stays_as_it_is():
    assert processed("a,  b ,c") == "a,  b ,c"


def test_doubled_braces_are_literal():
    assert processed("{{a}} {b|b} {x|x}", enable_wildcard=True) == "{a} b x"


def test_wildcards_choose_every_option():
    chosen = {processed("{red|green|blue} cat", seed=seed, enable_wildcard=True) for seed in range(50)}
    assert chosen == {"red cat", "green cat", "blue cat"}


def test_shuffling_keeps_the_first_tokens_and_loses_none():
    shuffled = {processed("k, a, b, c", seed=seed, shuffle_caption=True, keep_tokens=1) for seed in range(50)}
    assert len(shuffled) == 6
    assert all(caption.startswith("k, ") and sorted(caption.split(", ")) == list("abck") for caption in shuffled)


def test_dropout_rate_is_the_share_of_empty_captions():
    dropped = sum(processed("a", seed=seed, caption_dropout_rate=0.3) == "" for seed in range(2000))
    assert dropped / 2000 == pytest.approx(0.3, abs=0.04)


def test_every_second_epoch_has_empty_captions():
    assert [processed("a", epoch=epoch, caption_dropout_every_n_epochs=2) for epoch in (1, 2, 3, 4)] == [
        "a",
        "",
        "a",
        "",
    ]


def test_tag_dropout_spares_tokens_before_and_after_the_separator():
    caption = processed("k ||| a, b ||| z", keep_tokens_separator="|||", caption_tag_dropout_rate=1.0)
    assert caption == "k, z"


def test_warmup_counts_tokens_up_to_all():
    captions = [processed("a, b, c, d", step=step, token_warmup_step=4) for step in range(5)]
    assert [len(caption.split(", ")) for caption in captions] == [1, 1, 2, 3, 4]
