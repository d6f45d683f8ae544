"""What --dry_run and the warnings of a run say of a dataset: pictures, sizes, captions, steps, room on the disk."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from library import disk_space
from library.dataset.audit import Audit, audit_of
from library.dataset.buckets import choose_buckets_of
from library.dataset.likeness import like_pictures, same_pictures
from library.dataset.picture_files import Decoded, decode_pictures
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import scan_dataset, verify_pictures
from library.errors import UserError
from library.families.clip import build_tokenizer, weighted_tokens
from library.families.clip_vocabulary import token_counts
from library.families.detect import inspect_checkpoint
from library.network_files import read_weights
from library.options.cli import read_options
from library.options.groups import TrainNetworkOptions
from library.preflight import preflight
from library.training.plan import step_plan
from tests import tiny
from tests.test_mistakes import run
from train_network import train

SETTINGS = dict(
    resolution="128",
    enable_bucket=True,
    min_bucket_reso=64,
    max_bucket_reso=256,
    caption_extension=".txt",
    dry_run=True,
)


def drawing(seed: int, size_wh: tuple[int, int] = (128, 128)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size_wh, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good pictures with captions in `2_猫`."""
    folder = tmp_path / "train 数据" / "2_猫"
    folder.mkdir(parents=True)
    for number in range(4):
        drawing(number).save(folder / f"图 {number}.png")
        (folder / f"图 {number}.txt").write_text(f"cat, garden, number {number}", encoding="utf-8")
    return folder


def audited(folder: Path, **settings: object) -> Audit:
    options = TrainNetworkOptions(**(SETTINGS | {"train_data_dir": str(folder.parent)} | settings))
    index = PictureIndex()
    scanned = scan_dataset(options, index=index)
    decoded = verify_pictures(scanned.records, index=index)
    return audit_of(options, scanned, choose_buckets_of(scanned), decoded, index)


def found(audit: Audit, words: str) -> list[str]:
    return next((finding.items for finding in audit.findings if words in finding.what), [])


def test_a_good_dataset_has_nothing_to_say(folder):
    audit = audited(folder)
    assert audit.findings == []
    (subset,) = audit.subsets
    assert (subset.num_pictures, subset.num_captioned, subset.num_repeats) == (4, 4, 2)
    assert audit.sizes == {(128, 128): 4}
    assert audit.tags == {"cat": 4, "garden": 4} | {f"number {number}": 1 for number in range(4)}


def test_enlarged_pictures_are_named_with_how_much(folder):
    drawing(5, (100, 100)).save(folder / "a.png")
    assert found(audited(folder), "smaller than the size") == ["2_猫/a.png 1.3 times"]
    assert not any("smaller" in line for line in audited(folder).warnings)
    drawing(6, (40, 40)).save(folder / "b.png")
    assert audited(folder).warnings[0] == (
        "2 pictures are smaller than the size they are trained at, and enlarged, the smallest 3.2 times "
        "(2_猫/b.png 3.2 times, 2_猫/a.png 1.3 times)"
    )


def test_small_pictures_that_keep_their_size_are_listed(folder):
    drawing(5, (100, 100)).save(folder / "a.png")
    audit = audited(folder, bucket_no_upscale=True)
    assert found(audit, "bucket_no_upscale") == ["2_猫/a.png"]
    assert found(audit, "enlarged") == []


def test_pictures_of_which_much_is_cut_off_are_told(folder):
    drawing(5, (1280, 128)).save(folder / "wide.png")
    (line,) = audited(folder).warnings
    assert line.startswith("1 picture is of a shape that fits no bucket")
    assert "2_猫/wide.png 60%" in line  # the widest bucket is 256x64


def test_copies_are_told_and_those_that_only_look_alike(folder):
    (folder / "copy.png").write_bytes((folder / "图 1.png").read_bytes())
    drawing(2, (300, 300)).save(folder / "larger.jpg", quality=60)
    turned = drawing(3).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned back
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    ImageOps.mirror(drawing(0)).save(folder / "mirrored.png")  # another picture to a hash
    audit = audited(folder)
    assert found(audit, "same bytes") == ["2_猫/copy.png = 2_猫/图 1.png"]
    assert sorted(found(audit, "same look")) == ["2_猫/larger.jpg = 2_猫/图 2.png", "2_猫/turned.jpg = 2_猫/图 3.png"]
    assert sum("others" in line for line in audit.warnings) == 2


def test_plain_pictures_and_other_colours_are_not_called_alike(folder):
    for name in ("red", "blue"):
        Image.new("RGB", (128, 128), name).save(folder / f"{name}.png")
    picture = drawing(1)
    Image.blend(picture, Image.new("RGB", picture.size, "red"), 0.3).save(folder / "tinted.png")
    assert found(audited(folder), "same look") == []


def test_like_pictures_are_all_found_and_in_seconds_among_many():
    """Pairs that differ in up to three bits of random hashes, as made; then very many that are near each other."""
    rng = random.Random(0)
    looks = [rng.getrandbits(64) for _ in range(300)]
    looks += [look ^ (1 << rng.randrange(64)) ^ (1 << rng.randrange(64)) ^ (1 << rng.randrange(64)) for look in looks]
    groups = like_pictures({f"{i}.png": decoded(i, look) for i, look in enumerate(looks)})
    assert [sorted(int(Path(file).stem) for file in group) for group in groups] == sorted(
        ([i, i + 300] for i in range(300)), key=lambda pair: sorted(f"{i}.png" for i in pair)
    )
    many = {f"{i}.png": decoded(i, rng.getrandbits(16) << 40 | 2**40 - 1 >> 8) for i in range(10_000)}
    start = time.process_time()
    like_pictures(many)  # of 65,536 looks that are near each other
    assert time.process_time() - start < 5
    assert same_pictures(many) == []


def decoded(content: int, look: int) -> Decoded:
    return Decoded((64, 64), True, look, 0, content, 1, 1)


def test_captions_that_are_empty_or_of_no_picture_are_listed(folder):
    (folder / "图 0.txt").write_text(" \n", encoding="utf-8")
    (folder / "gone.txt").write_text("a dog", encoding="utf-8")
    (folder / "图 1.txt").unlink()
    (folder / "图 2.caption").write_text("another", encoding="utf-8")
    audit = audited(folder)
    assert found(audit, "empty caption") == ["2_猫/图 0.png"]
    assert found(audit, "of no picture") == ["2_猫/gone.txt"]
    assert "1 caption file is of no picture (2_猫/gone.txt)" in audit.warnings
    (subset,) = audit.subsets
    assert (subset.num_captioned, subset.num_empty, subset.num_orphans) == (3, 1, 1)


@pytest.mark.parametrize(("limit", "advice"), [(None, "150"), (150, "225"), (225, None)])
def test_captions_over_the_limit_are_named_with_their_length(folder, limit, advice):
    num_words = (limit or 75) - 1
    (folder / "图 1.txt").write_text("cat " * num_words, encoding="utf-8")
    assert found(audited(folder, max_token_length=limit), "tokens") == []
    audit = audited(folder, max_token_length=limit, caption_prefix="a big")
    assert found(audit, "tokens") == [f"2_猫/图 1.png {num_words + 2} tokens"]
    assert (f"--max_token_length {advice}" in audit.warnings[0]) == (advice is not None)


def test_token_counts_are_those_of_the_tokenizer_of_training():
    texts = [
        "", "a photo of a cat", "1girl, solo, (long hair:1.2), [red] eyes, ^_^, don't", "Ünï çödé  ẞ ΑΣ", "猫，狗 🐈‍⬛",
        "x" * 300, "a\tb\u3000c\n d", "e\u0301 \u0301x", "3.14,2077", "... --- (((",
    ]  # fmt: skip
    tokenizer = build_tokenizer()
    assert token_counts(texts) == {text: len(tokenizer(text).input_ids) - 2 for text in texts}
    assert token_counts(texts, weighted=True) == {text: len(weighted_tokens(tokenizer, text)) for text in texts}


def test_damaged_pictures_have_reasons(folder):
    (folder / "图 0.png").write_bytes((folder / "图 0.png").read_bytes()[:-200])
    good, damaged = decode_pictures(folder.glob("*.png"))
    assert len(good) == 3
    assert damaged[0].startswith(f"{folder / '图 0.png'} (")


# --- room on the disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("unet_only", [False, True])
def test_size_of_a_network_is_told_beforehand(kind, unet_only, request, pictures, tmp_path):
    name = {"sd1": "tiny_file", "sd2": "tiny_sd2_file", "sdxl": "tiny_sdxl_file"}[kind]
    model = request.getfixturevalue(name)
    train(tiny.arguments(model, pictures, tmp_path, network_train_unet_only=unet_only, max_train_steps=1))
    options = TrainNetworkOptions(network_dim=4, network_train_unet_only=unet_only)
    told = disk_space.num_parameters(options, inspect_checkpoint(str(model)))
    weights = read_weights(tmp_path / "lora.safetensors")
    assert told == pytest.approx(sum(w.numel() for name, w in weights.items() if "alpha" not in name), rel=0.05)


@pytest.mark.parametrize("more", [{}, {"ema": True}, {"network_module": "networks.adalora", "ema": True}])
def test_size_of_a_state_is_told_beforehand(more, tiny_file, pictures, tmp_path):
    more = dict(network_dim=32, max_train_steps=1, save_state_on_train_end=True) | more
    arguments = tiny.arguments(tiny_file, pictures, tmp_path / "out", **more)
    needs = preflight(read_options(TrainNetworkOptions, arguments)).disk_needs
    (told,) = (need.num_bytes for need in needs if need.what == "states")
    train(arguments)
    found = sum(path.stat().st_size for path in (tmp_path / "out" / "lora-state").iterdir())
    assert told == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"save_every_n_epochs": 1}, 10),
        ({"save_every_n_epochs": 3}, 4),
        ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, 3),
        ({"save_every_n_steps": 20}, 5),
        ({"save_every_n_steps": 10, "save_last_n_steps": 20}, 4),
    ],
)
def test_network_files_that_are_kept_are_counted(settings, expected):
    options = TrainNetworkOptions(max_train_epochs=10, **settings)
    assert disk_space.num_checkpoints(options, step_plan(options, 10, 10, 1)) == expected


def test_a_disk_that_is_certainly_too_small_is_an_error_and_a_doubtful_one_a_warning(tmp_path):
    free = disk_space.free_bytes(tmp_path / "not" / "there")
    need = disk_space.DiskNeed("latents", tmp_path, 3, 3 * free, 2 * free)
    with pytest.raises(UserError, match=r"the disk of .* has .* left, and the run writes more: latents"):
        disk_space.check_disk_space([need])
    (warning,) = disk_space.check_disk_space([disk_space.DiskNeed("latents", tmp_path, 3, 3 * free, 0)])
    assert "may be too little" in warning
    assert disk_space.check_disk_space([disk_space.DiskNeed("latents", tmp_path, 3, 1, 1)]) == []


# --- --dry_run -------------------------------------------------------------------------------------------------------


def test_dry_run_prints_tables_before_it_imports_torch_and_writes_nothing(tiny_file, folder, tmp_path):
    (folder / "gone.txt").write_text("a dog", encoding="utf-8")
    output = tmp_path / "output"
    words = tiny.arguments(tiny_file, folder.parent, output, dry_run=True, cache_latents_to_disk=True, save_state=True)
    result = run(*words)  # without numpy, torch and the like
    assert result.returncode == 1 and "torch was imported" in result.stderr  # where it goes on to measure
    for text in (
        "Stable Diffusion 1.x model", "128x128", "number 3", "2_猫/gone.txt", "batches an epoch", "network files",
        "states", "latents", "GB",
    ):  # fmt: skip
        assert text in result.stdout
    assert "1 caption file is of no picture" in result.stderr
    assert not output.exists()
    assert not list(folder.glob("*.npz"))
