"""A caption as one training step sees it: dropped out, wildcards chosen, tags shuffled."""

import math
import random
import re
from dataclasses import replace

from library.dataset.config import SubsetOptions

_WILDCARD = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # stand for {{ and }} while wildcards are replaced


def process_caption(
    caption: str, subset: SubsetOptions, *, step: int, epoch: int, max_train_steps: int, rng: random.Random
) -> str:
    """The caption of one draw at optimizer step `step` (from 0) of epoch `epoch` (from 1); "" where dropped out."""
    caption = _with_prefix_and_suffix(caption, subset)
    if _is_dropped(subset, epoch, rng):
        return ""
    caption = _choose_wildcards(caption, rng) if subset.enable_wildcard else caption.split("\n")[0]
    if takes_tags_apart(subset):
        caption = _rearranged(caption, subset, step, max_train_steps, rng)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def takes_tags_apart(subset: SubsetOptions) -> bool:
    """Whether anything is done with single tags; where nothing is, a caption stays in one piece."""
    return subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0


def possible_captions(caption: str, subset: SubsetOptions) -> list[str] | None:
    """All that `process_caption` makes of a caption; None where it changes from draw to draw."""
    if takes_tags_apart(subset) or subset.enable_wildcard:
        return None
    whole = replace(subset, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0)
    captions = [process_caption(caption, whole, step=0, epoch=1, max_train_steps=1, rng=random.Random(0))]
    return captions if whole == subset else [*captions, ""]


def _with_prefix_and_suffix(caption: str, subset: SubsetOptions) -> str:
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    return caption


def _is_dropped(subset: SubsetOptions, epoch: int, rng: random.Random) -> bool:
    by_chance = subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate
    every_n_epochs = subset.caption_dropout_every_n_epochs
    return by_chance or (every_n_epochs > 0 and epoch % every_n_epochs == 0)


def _choose_wildcards(caption: str, rng: random.Random) -> str:
    """One line of the caption with each {a|b} replaced by one of its choices; {{ and }} are literal braces."""
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    caption = _WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), caption)
    return caption.replace(_OPEN, "{").replace(_CLOSE, "}")


def _rearranged(caption: str, subset: SubsetOptions, step: int, max_train_steps: int, rng: random.Random) -> str:
    """The caption after token warm-up, shuffling and tag drop-out, which spare the kept tokens."""
    kept_first, flexible, kept_last = _split_tokens(caption, subset)
    flexible = flexible[: _num_warm_tokens(len(flexible), subset, step, max_train_steps)]
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if subset.caption_tag_dropout_rate > 0:
        flexible = [token for token in flexible if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(kept_first + flexible + kept_last)


def _split_tokens(caption: str, subset: SubsetOptions) -> tuple[list[str], list[str], list[str]]:
    """Tokens kept at the front, tokens that may move or go, tokens kept at the end."""
    separator = subset.keep_tokens_separator
    if separator and separator in caption:
        parts = caption.split(separator, 2) + [""]
        first, flexible, last = (_tokens(part, subset.caption_separator) for part in parts[:3])
        return [t for t in first if t], [t for t in flexible if t], [t for t in last if t]
    tokens = _tokens(caption, subset.caption_separator)
    num_kept = max(subset.keep_tokens, 0)
    return tokens[:num_kept], tokens[num_kept:], []


def _tokens(text: str, separator: str) -> list[str]:
    return [token.strip() for token in text.strip().split(separator)]


def _num_warm_tokens(num_tokens: int, subset: SubsetOptions, step: int, max_train_steps: int) -> int:
    """How many of the tokens take part at this step: rises from token_warmup_min to all at token_warmup_step."""
    last_step = subset.token_warmup_step
    if last_step < 1:
        last_step = math.floor(last_step * max_train_steps)
    if last_step <= 0 or step >= last_step:
        return num_tokens
    return math.floor(step * (num_tokens - subset.token_warmup_min) / last_step) + subset.token_warmup_min
