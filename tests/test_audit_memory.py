"""What is remembered of an audit: after any change it is what a fresh audit finds, and only what is new is counted."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from library.dataset import audit, caption_audit
from library.dataset.audit import Audit
from library.dataset.audit_memory import AuditMemory
from library.dataset.index_file import StoredIndex
from library.dataset.picture_index import NAME, PictureIndex
from library.dataset.scan import scan_dataset, verify_pictures
from library.options.groups import TrainNetworkOptions
from tests.test_audit import SETTINGS, audit_of, choose_buckets_of, drawing

WORDS = ["cat", "garden", "red dress", "猫", "x" * 90, "very long words indeed"]


def audited(train_dir: Path, index: PictureIndex | None = None, **settings: object) -> Audit:
    """A start, which remembers where it is given an index."""
    options = TrainNetworkOptions(**(SETTINGS | {"train_data_dir": str(train_dir)} | settings))
    used = index or PictureIndex()
    scanned = scan_dataset(options, index=used)
    decoded = verify_pictures(scanned.records, num_threads=1, index=used)
    found = audit_of(options, scanned, choose_buckets_of(scanned), decoded, used)
    used.write()
    return found


def write_caption(path: Path, rng: random.Random) -> None:
    path.write_text(", ".join(rng.choices(WORDS, k=rng.choice((0, 3, 40)))), encoding="utf-8")
    os.utime(path, (10**9 + rng.randrange(10**6),) * 2)


def write_drawing(path: Path, rng: random.Random) -> None:
    drawing(rng.randrange(4)).save(path)
    os.utime(path, (10**9 + rng.randrange(10**6),) * 2)


@pytest.fixture
def train_dir(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name in ("2_猫", "1_dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(6):
            write_drawing(tmp_path / "train" / name / f"{number}.png", rng)
            write_caption(tmp_path / "train" / name / f"{number}.txt", rng)
    return tmp_path / "train"


def change(train_dir: Path, rng: random.Random) -> None:
    folder = rng.choice(sorted(train_dir.iterdir()))
    path = folder / f"{rng.randrange(8)}.{rng.choice(('txt', 'png'))}"
    if path.exists() and rng.random() < 0.3 and len(list(folder.glob("*.png"))) > 2:
        path.unlink()
    elif path.suffix == ".txt":
        write_caption(path, rng)
    else:
        write_drawing(path, rng)


@pytest.mark.parametrize("seed", range(4))
def test_remembered_findings_are_those_of_a_fresh_audit(train_dir, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(8):
        change(train_dir, rng)
        settings = dict(
            max_token_length=rng.choice((None, 150)),
            weighted_captions=rng.choice((True, False)),
            resolution=rng.choice(("128", "160")),
            caption_prefix=rng.choice((None, "a drawing of (a:1.2)")),
        )
        remembered = audited(train_dir, **settings)
        shutil.copytree(train_dir, tmp_path / "fresh" / "train", ignore=shutil.ignore_patterns(NAME))
        fresh = audited(tmp_path / "fresh" / "train", **settings)
        shutil.rmtree(tmp_path / "fresh")
        moved = [replace(subset, source=train_dir / subset.source.name) for subset in fresh.subsets]
        assert remembered == replace(fresh, subsets=moved)


def test_only_what_is_new_is_counted(train_dir, monkeypatch):
    counted, compared = [], []
    real_count, real_like = caption_audit.token_counts, audit.like_pictures
    monkeypatch.setattr(caption_audit, "token_counts", lambda texts, w: counted.extend(texts) or real_count(texts, w))
    monkeypatch.setattr(audit, "like_pictures", lambda decoded: compared.append(len(decoded)) or real_like(decoded))
    first = audited(train_dir)
    assert compared == [12]
    counted.clear()
    assert audited(train_dir) == first
    (train_dir / "2_猫" / "3.txt").write_text("a bird")
    audited(train_dir)
    assert (counted, compared) == (["a bird"], [12])
    audited(train_dir, dry_run=False)
    audited(train_dir, caption_suffix="by me")  # another use of the same captions
    assert len(counted) > 6 and compared == [12]


@pytest.mark.parametrize(
    "answers",
    [
        b"[]",
        b'{"same": 1}',
        b'{"same": ["x"]}',
        b"[" * 100_000,
        b"\xff",
        b'{"same": ["' + b"00" * 16 + b'", "[[1, 2]]"]}',
    ],
)
def test_a_memory_that_is_no_memory_answers_nothing(answers):
    memory = AuditMemory(bytes(4) + len(answers).to_bytes(4, "little") + answers)
    assert memory.answer("same", bytes(16), lambda: [["a", "b"]], audit._is_groups) == [["a", "b"]]
    assert AuditMemory(memory.packed()).answer("same", bytes(16), list, audit._is_groups) == [["a", "b"]]


def test_the_memory_lies_beside_the_first_picture(train_dir):
    audited(train_dir)
    kept = [bool(StoredIndex((folder / NAME).read_bytes()).audit) for folder in sorted(train_dir.iterdir())]
    assert kept == [True, False]
