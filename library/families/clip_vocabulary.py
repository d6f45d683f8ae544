"""CLIP's vocabulary, which all text encoders share, and how many tokens captions have. Needs no torch."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from library.families.prompt_weights import parse_weights

MERGES_PATH = Path(__file__).parent / "assets" / "clip" / "merges.txt"
CHUNK = 75  # tokens of content in one pass of the encoder; BOS and EOS make 77
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP's own


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in CLIP's vocabulary, in vocabulary order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order; both follow from the merges file alone (49,408 tokens)."""
    lines = MERGES_PATH.read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def token_counts(captions: Iterable[str], weighted: bool = False) -> dict[str, int]:
    """Caption -> its tokens without beginning and end; with `weighted`, what says how words are weighted is none.

    No token reaches over a space, so that every distinct word is looked up once.
    """
    texts = {text: [piece for piece, _ in parse_weights(text)] if weighted else [text] for text in captions}
    words = sorted({word for pieces in texts.values() for piece in pieces for word in piece.split()})
    encodings = _counting_tokenizer().encode_batch_fast(words, add_special_tokens=False) if words else []
    lengths = {word: len(encoding) for word, encoding in zip(words, encodings, strict=True)}
    return {text: sum(lengths[word] for piece in pieces for word in piece.split()) for text, pieces in texts.items()}


@cache
def _counting_tokenizer() -> Tokenizer:
    """The tokenizer of transformers' CLIPTokenizer as far as it counts, put together from the same parts."""
    vocabulary, merges = clip_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    normal = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(normal)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
