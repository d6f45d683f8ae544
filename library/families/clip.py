"""CLIP text conditioning: the tokenizer, captions longer than 75 tokens, weights in captions, clip_skip."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from library.families.clip_vocabulary import CHUNK, clip_vocabulary
from library.families.prompt_weights import parse_weights

MOST_WORDS = 20_000  # that a tokenizer's tokens are remembered of
_tokens_of_words: WeakKeyDictionary[CLIPTokenizer, dict[str, list[int]]] = WeakKeyDictionary()


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer from the merges shipped here; `pad_token` is "!" for OpenCLIP encoders."""
    vocabulary, merges = clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)
    assert len(tokenizer) == 49408, "the installed transformers read the CLIP vocabulary wrongly"
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1) -> Tensor:
    """Token ids [B, num_chunks, 77]: each chunk is BOS, 75 tokens of the caption, and an end token."""
    ids = [padded(tokenizer, tokens_of(tokenizer, caption), num_chunks) for caption in captions]
    return in_chunks(tokenizer, torch.tensor(ids), num_chunks)


def tokenize_weighted(tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids [B, num_chunks, 77] of captions with weights, and the weight of each hidden state [B, L, 1]."""
    space = num_chunks * CHUNK
    ids, weights = [], []
    for caption in captions:
        tokens = weighted_tokens(tokenizer, caption)[:space]
        ids.append(padded(tokenizer, [token for token, _ in tokens], num_chunks))
        weights.append([1.0, *(weight for _, weight in tokens), 1.0, *[1.0] * (space - len(tokens))])
    return in_chunks(tokenizer, torch.tensor(ids), num_chunks), torch.tensor(weights).unsqueeze(-1)


def weighted_tokens(tokenizer: CLIPTokenizer, caption: str) -> list[tuple[int, float]]:
    """Tokens of a caption's pieces with the pieces' weights, without BOS and EOS."""
    return [(token, weight) for text, weight in parse_weights(caption) for token in tokens_of(tokenizer, text)]


def tokens_of(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """All tokens of a text, without BOS and EOS.

    No token of CLIP's spans a space, so those of each word are remembered: captions whose tags are shuffled or dropped
    hold no new words.
    """
    known, words = _tokens_of_words.setdefault(tokenizer, {}), text.split(" ")
    if len(known) > MOST_WORDS:
        known.clear()
    if new := [word for word in dict.fromkeys(words) if word not in known]:
        ids = tokenizer(new, verbose=False).input_ids
        known |= {word: tokens[1:-1] for word, tokens in zip(new, ids, strict=True)}
    return [token for word in words for token in known[word]]


def padded(tokenizer: CLIPTokenizer, tokens: list[int], num_chunks: int) -> list[int]:
    """BOS, as many tokens as the chunks have space for, EOS, and padding."""
    space = num_chunks * CHUNK
    padding = [tokenizer.pad_token_id] * (space - len(tokens))
    return [tokenizer.bos_token_id, *tokens[:space], tokenizer.eos_token_id, *padding]


def in_chunks(tokenizer: CLIPTokenizer, ids: Tensor, num_chunks: int) -> Tensor:
    """Ids [B, 75 n + 2] of one BOS, content and end as chunks [B, n, 77] that have each their own."""
    chunks = ids[:, 1:-1].unflatten(1, (num_chunks, CHUNK))
    first, last = ids[:, :1].unsqueeze(1), ids[:, -1:].unsqueeze(1)
    ends = [part.expand(-1, num_chunks, -1) for part in (first, last)]
    chunks = torch.cat([ends[0], chunks, ends[1]], dim=2)
    return chunks if tokenizer.pad_token_id == tokenizer.eos_token_id else _with_own_ends(chunks, tokenizer)


def _with_own_ends(chunks: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """Where padding is not EOS, a chunk that ends in content ends in EOS, and an empty one starts with it."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    chunks = chunks.clone()
    before_last = chunks[:, :, -2]
    chunks[:, :, -1] = torch.where((before_last != eos) & (before_last != pad), eos, chunks[:, :, -1])
    chunks[:, :, 0] = bos
    chunks[:, :, 1] = torch.where(chunks[:, :, 1] == pad, eos, chunks[:, :, 1])
    return chunks


def encode(text_encoder: CLIPTextModel, ids: Tensor, clip_skip: int | None) -> Tensor:
    """Hidden states [B, 75 n + 2, D] of token ids [B, n, 77].

    clip_skip k takes the k-th hidden state from the end through the final layer norm; None and 1 are the last layer.
    """
    output = text_encoder(ids.flatten(0, 1), output_hidden_states=clip_skip is not None)
    if clip_skip is None:
        hidden = output.last_hidden_state
    else:
        hidden = getattr(text_encoder, "text_model", text_encoder).final_layer_norm(output.hidden_states[-clip_skip])
    return chunks_joined(hidden, *ids.shape[:2])


def encode_penultimate(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, 75 n + 2, D] of ids [B, n, 77] before the last layer, as they are, as SDXL takes them.

    An encoder with a projection also gives the projected state at the end of the first chunk's text, [B, P].
    """
    output = text_encoder(ids.flatten(0, 1), output_hidden_states=True)
    hidden = chunks_joined(output.hidden_states[-2], *ids.shape[:2])
    projected = getattr(output, "text_embeds", None)
    return hidden, None if projected is None else projected.unflatten(0, ids.shape[:2])[:, 0]


def chunks_joined(hidden: Tensor, batch_size: int, num_chunks: int) -> Tensor:
    """[B, 75 n + 2, D] of hidden states [B n, 77, D]: one beginning, the contents, one end."""
    hidden = hidden.unflatten(0, (batch_size, num_chunks))  # [B, n, 77, D]
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)


def chunks_needed(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> int:
    """Passes of 75 tokens that the longest of some texts with weights needs, at most 3."""
    num_tokens = max(len(weighted_tokens(tokenizer, text)) for text in texts)
    return min(3, max(1, -(-num_tokens // CHUNK)))


def weighed_keeping_mean(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states [B, L, D] times weights [B, L, 1], scaled so that the mean of each sample stays what it was."""
    weighed = hidden * weights
    wanted, mean = (states.float().mean(dim=(1, 2), keepdim=True) for states in (hidden, weighed))  # [B, 1, 1]
    has_weights = (weights != 1).any(dim=1, keepdim=True)
    return weighed * torch.where(has_weights, wanted / mean, 1.0).to(hidden.dtype)
