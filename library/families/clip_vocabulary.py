"""CLIP's vocabulary, which all text encoders share, and how many tokens captions have. Needs no torch."""

from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from library.families.prompt_weights import parse_weights

MERGES_PATH = Path(__file__).parent / "assets" / "clip" / "merges.txt"
CHUNK = 75  # tokens of content in one pass of the encoder; BOS and EOS make 77
CAPTIONS_AT_ONCE = 10_000  # whose words are in memory together
DIGITS_TO_ZERO = str.maketrans("123456789", "0" * 9)
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
    lengths: dict[str, int] = {}
    counts: dict[str, int] = {}
    remaining = iter(captions)
    while texts := list(islice(remaining, CAPTIONS_AT_ONCE)):
        words_of = {text: _words(text, weighted) for text in texts}
        lengths |= _num_tokens(set().union(*words_of.values()) - lengths.keys())
        counts |= {text: sum(map(lengths.__getitem__, words)) for text, words in words_of.items()}
    return counts


def _words(text: str, weighted: bool) -> list[str]:
    return [word for piece, _ in parse_weights(text) for word in piece.split()] if weighted else text.split()


def _num_tokens(words: set[str]) -> dict[str, int]:
    """Word -> its tokens. Every digit is one, so that numbers of as many digits are looked up together."""
    shapes = {word: word.translate(DIGITS_TO_ZERO) for word in words}
    distinct = sorted(set(shapes.values()))
    encodings = _counting_tokenizer().encode_batch_fast(distinct, add_special_tokens=False) if distinct else []
    lengths = {shape: len(encoding) for shape, encoding in zip(distinct, encodings, strict=True)}
    return {word: lengths[shape] for word, shape in shapes.items()}


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
