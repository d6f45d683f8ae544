"""What the audit of a dataset found, remembered by what it was found of, so that only what is new is looked at again.

Nothing here depends on the dataset's options: an answer is kept with a digest of all that it follows from, and how
many tokens a caption has with a digest of the caption. A memory that is broken is empty.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

HEAD = struct.Struct("<II")  # captions, bytes of the answers
T = TypeVar("T")


class AuditMemory:
    """Answers, and the numbers of tokens of captions."""

    def __init__(self, data: bytes = b""):
        self.has_changed = False
        self._token_counts: dict[int, int] = {}  # digest of a caption -> its tokens
        self._answers: dict[str, list[str]] = {}  # question -> digest in hexadecimal, answer as JSON
        with suppress(ValueError, RecursionError, struct.error):
            self._token_counts, self._answers = _unpacked(data)

    def answer(self, question: str, digest: bytes, compute: Callable[[], T], is_answer: Callable[[Any], bool]) -> T:
        """The remembered answer to a question about what has this digest, else the computed one; JSON can hold it."""
        known = self._answers.get(question)
        if known and known[0] == digest.hex():
            with suppress(ValueError, RecursionError):
                if is_answer(answer := json.loads(known[1])):
                    return answer
        answer = compute()
        self._answers[question] = [digest.hex(), json.dumps(answer)]
        self.has_changed = True
        return answer

    def token_counts(self, digests: Sequence[int], count: Callable[[list[int]], Mapping[int, int]]) -> list[int]:
        """How many tokens the captions with these digests have; `count` is asked for those of them at some places."""
        counts = list(map(self._token_counts.get, digests))
        new = [place for place, known in enumerate(counts) if known is None]
        for place, num_tokens in (count(new) if new else {}).items():
            counts[place] = num_tokens
        known = dict(zip(digests, counts, strict=True))
        if new or len(known) < len(self._token_counts):
            self._token_counts = known
            self.has_changed = True
        return counts

    def packed(self) -> bytes:
        """The memory as bytes."""
        answers = json.dumps(self._answers).encode()
        num = len(self._token_counts)
        digests, counts = (
            struct.pack(f"<{num}Q", *self._token_counts),
            struct.pack(f"<{num}I", *self._token_counts.values()),
        )
        return b"".join((HEAD.pack(num, len(answers)), digests, counts, answers))


def digest_of(parts: Iterable[str | bytes]) -> bytes:
    """16 bytes that tell whether texts and bytes are the same."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()


def caption_digests(captions: Sequence[str], use: str) -> Sequence[int]:
    """A digest of 64 bits of each caption as it is used in one way."""
    person = hashlib.blake2b(use.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    digests = [
        hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest()
        for caption in captions
    ]
    return struct.unpack(f"<{len(digests)}Q", b"".join(digests))


def _unpacked(data: bytes) -> tuple[dict[int, int], dict[str, list[str]]]:
    num, num_answer_bytes = HEAD.unpack_from(data)
    if len(data) != HEAD.size + 12 * num + num_answer_bytes:
        raise ValueError("the memory is cut off")
    digests = struct.unpack_from(f"<{num}Q", data, HEAD.size)
    counts = struct.unpack_from(f"<{num}I", data, HEAD.size + 8 * num)
    answers = json.loads(data[HEAD.size + 12 * num :])
    if not isinstance(answers, dict) or not all(map(_is_pair_of_texts, answers.values())):
        raise ValueError("no answers")
    return dict(zip(digests, counts, strict=True)), answers


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
