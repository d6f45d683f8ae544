"""Captions become the tokens and hidden states that the models were made with."""

import random

import pytest
import torch
from transformers import CLIPTokenizer

from library.families.clip import (
    CHUNK,
    build_tokenizer,
    clip_vocabulary,
    encode,
    tokenize,
    tokenize_weighted,
    tokens_of,
    weighed_keeping_mean,
    weighted_tokens,
)
from tests import tiny

BOS, EOS = 49406, 49407
WORDS = " ".join(["cat"] * 100)
CAT = 2368


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    return build_tokenizer(pad_token="!")


@pytest.fixture(scope="module")
def text_encoder():
    return tiny.models().text_encoders[0]


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("a photo of a cat", [BOS, 320, 1125, 539, 320, CAT, EOS]),
        ("A Photo  of a CAT", [BOS, 320, 1125, 539, 320, CAT, EOS]),
        ("", [BOS, EOS]),
        ("!", [BOS, 256, EOS]),
    ],
)
def test_ids_are_those_of_openai_clip(caption, ids, tokenizer):
    assert tokenizer(caption).input_ids == ids


def test_vocabulary_has_49408_tokens_each_with_an_id_of_its_own(tokenizer):
    vocabulary, merges = clip_vocabulary()
    assert len(tokenizer) == len(vocabulary) == 49408
    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(merges) == 49408 - 2 * 256 - 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, EOS)


def test_open_clip_pads_with_0(open_clip_tokenizer):
    assert open_clip_tokenizer.pad_token_id == 0


def test_captions_in_chinese_have_tokens_and_are_told_apart(tokenizer):
    ids = tokenize(tokenizer, ["一只猫", "一只狗"])
    assert len(weighted_tokens(tokenizer, "一只猫")) >= 3
    assert ids.shape == (2, 1, 77) and not torch.equal(ids[0], ids[1])
    assert tokenizer.decode(tokenizer("一只猫").input_ids, skip_special_tokens=True).replace(" ", "") == "一只猫"


@pytest.mark.parametrize(
    ("caption", "count"), [("", 0), ("a photo of a cat", 5), ("a (photo:1.2) of [a] cat", 5), (WORDS, 100)]
)
def test_tokens_are_counted_without_begin_and_end_and_brackets(caption, count, tokenizer):
    assert len(weighted_tokens(tokenizer, caption)) == count


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_every_chunk_has_begin_75_tokens_and_end(num_chunks, tokenizer):
    ids = tokenize(tokenizer, ["a photo of a cat", WORDS], num_chunks)
    assert ids.shape == (2, num_chunks, 77)
    assert (ids[:, :, 0] == BOS).all() and (ids[:, :, -1] == EOS).all()
    content = ids[:, :, 1:-1].flatten(1)  # [B, 75 n]
    num_words = min(100, 75 * num_chunks)
    assert content[0].tolist() == [320, 1125, 539, 320, CAT] + [EOS] * (75 * num_chunks - 5)
    assert content[1].tolist() == [CAT] * num_words + [EOS] * (75 * num_chunks - num_words)


def test_one_chunk_is_what_the_tokenizer_gives_to_the_pipelines(tokenizer):
    captions = ["a photo of a cat", WORDS, ""]
    wanted = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, captions)[:, 0], wanted)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_tokens_of_words_are_those_of_the_whole_text(pad_token):
    tokenizer, rng = build_tokenizer(pad_token), random.Random(0)
    parts = [*"1.,()!\\\n\x1c\u0301\u00a0\u3000\u2028\u200d一，🐈ﬁİ", " ", "cat", "1girl", "'s", "  ", ", ", "e\u0301"]
    parts += ["<|endoftext|>", "<|startoftext|>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(15)))
        assert tokens_of(tokenizer, text) == tokenizer(text).input_ids[1:-1]


def test_a_second_epoch_with_shuffled_tags_asks_the_tokenizer_for_nothing(monkeypatch, caplog):
    tokenizer, rng = build_tokenizer(), random.Random(0)
    tags = ["1girl", "a (red) dress", "long hair", "蓝天白云" * 30]
    tokenize(tokenizer, [f"{', '.join(tags)},"])
    monkeypatch.setattr(CLIPTokenizer, "__call__", lambda *_, **__: pytest.fail("a word was tokenised again"))
    for _ in range(3):
        rng.shuffle(tags)
        tokenize(tokenizer, [f"{', '.join(tags)},"])
    assert not caplog.messages  # tokenizers say so where a text is long


def test_open_clip_chunk_that_ends_in_content_ends_in_eos_and_an_empty_one_starts_with_it(open_clip_tokenizer):
    first, second, third = tokenize(open_clip_tokenizer, [WORDS], 3)[0].tolist()
    assert first == [BOS] + [CAT] * 75 + [EOS]
    assert second == [BOS] + [CAT] * 25 + [EOS] + [0] * 50
    assert third == [BOS, EOS] + [0] * 75


def test_open_clip_caption_of_one_chunk_ends_in_one_eos(open_clip_tokenizer):
    assert tokenize(open_clip_tokenizer, ["a cat"])[0, 0].tolist() == [BOS, 320, CAT, EOS] + [0] * 73
    assert tokenize(open_clip_tokenizer, [""])[0, 0].tolist() == [BOS, EOS] + [0] * 75
    full = " ".join(["cat"] * 75)
    assert tokenize(open_clip_tokenizer, [full])[0, 0].tolist() == [BOS] + [CAT] * 75 + [EOS]
    assert tokenize(open_clip_tokenizer, [WORDS])[0, 0].tolist() == [BOS] + [CAT] * 75 + [EOS]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_captions_without_brackets_have_the_same_tokens_and_weights_of_1(num_chunks, pad_token):
    tokenizer = build_tokenizer(pad_token)
    captions = ["a photo of a cat", WORDS, "", " ".join(["cat"] * 75), " ".join(["cat"] * 150)]
    ids, weights = tokenize_weighted(tokenizer, captions, num_chunks)
    assert torch.equal(ids, tokenize(tokenizer, captions, num_chunks))
    assert weights.shape == (len(captions), num_chunks * CHUNK + 2, 1) and (weights == 1).all()


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_weights_are_those_of_the_tokens_and_1_for_begin_end_and_padding(pad_token):
    tokenizer = build_tokenizer(pad_token)
    ids, weights = tokenize_weighted(tokenizer, ["a (cat:1.5) [cat]"])
    assert torch.equal(ids, tokenize(tokenizer, ["a cat cat"]))
    wanted = [1.0, 1.0, 1.5, 1 / 1.1] + [1.0] * 73
    torch.testing.assert_close(weights[0, :, 0], torch.tensor(wanted))


def test_weights_go_on_in_the_next_chunk_and_are_cut_with_the_caption(tokenizer):
    caption = f"({' '.join(['cat'] * 80)}:1.5)"
    _, two_chunks = tokenize_weighted(tokenizer, [caption], 2)
    assert two_chunks[0, :, 0].tolist() == [1.0] + [1.5] * 80 + [1.0] * 71
    ids, one_chunk = tokenize_weighted(tokenizer, [caption], 1)
    assert one_chunk[0, :, 0].tolist() == [1.0] + [1.5] * 75 + [1.0]
    assert ids[0, 0].tolist() == [BOS] + [CAT] * 75 + [EOS]


def test_weighing_a_prompt_keeps_its_mean_and_leaves_others_alone():
    hidden = 1 + torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 77, 1)
    weights[0, 3:5] = 1.5
    found = weighed_keeping_mean(hidden, weights)
    assert torch.equal(found[1], hidden[1])
    torch.testing.assert_close(found[0].mean(), hidden[0].mean())
    torch.testing.assert_close(found[0, 3] / found[0, 2], 1.5 * hidden[0, 3] / hidden[0, 2])


def test_a_prompt_without_weights_stays_even_where_its_mean_is_0():
    hidden = torch.zeros(1, 77, 8)
    assert torch.equal(weighed_keeping_mean(hidden, torch.ones(1, 77, 1)), hidden)


# --- hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_chunks", "length"), [(1, 77), (2, 152), (3, 227)])
def test_chunks_are_joined_between_one_begin_and_one_end(num_chunks, length, tokenizer, text_encoder):
    ids = tokenize(tokenizer, ["a photo of a cat", WORDS], num_chunks)
    with torch.no_grad():
        hidden = encode(text_encoder, ids, None)
        chunks = [text_encoder(ids[:, n]).last_hidden_state for n in range(num_chunks)]
    assert hidden.shape == (2, length, 32)
    wanted = torch.cat([chunks[0][:, :1], *(chunk[:, 1:-1] for chunk in chunks), chunks[-1][:, -1:]], dim=1)
    torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-6)


def test_one_chunk_is_the_text_encoder_itself(tokenizer, text_encoder):
    ids = tokenize(tokenizer, ["a photo of a cat"])
    with torch.no_grad():
        assert torch.equal(encode(text_encoder, ids, None), text_encoder(ids[:, 0]).last_hidden_state)


def test_clip_skip_1_is_the_last_layer(tokenizer, text_encoder):
    ids = tokenize(tokenizer, ["a photo of a cat"])
    with torch.no_grad():
        assert torch.equal(encode(text_encoder, ids, 1), encode(text_encoder, ids, None))


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_is_an_earlier_layer_through_the_final_norm(clip_skip, tokenizer, text_encoder):
    ids = tokenize(tokenizer, ["a photo of a cat"])
    with torch.no_grad():
        states = text_encoder(ids[:, 0], output_hidden_states=True).hidden_states  # embeddings and 3 layers
        wanted = text_encoder.final_layer_norm(states[3 - (clip_skip - 1)])
        found = encode(text_encoder, ids, clip_skip)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, states[3 - (clip_skip - 1)])
    assert not torch.allclose(found, encode(text_encoder, ids, None))


def test_captions_of_a_batch_do_not_mix(tokenizer, text_encoder):
    ids = tokenize(tokenizer, ["a cat", "a dog and a cow"], 2)
    with torch.no_grad():
        both, alone = encode(text_encoder, ids, 2), encode(text_encoder, ids[1:], 2)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)
