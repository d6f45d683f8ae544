"""Latents on disk are used where they are those that this run would make, and made anew where not, saying why."""

import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.dataset.cache import CachedLatents, read_latents
from library.dataset.dataset import TrainingDataset
from library.dataset.images import to_model_input
from library.dataset.pack_files import read_index
from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.families.base import ModelFamily
from library.families.vae import Vae
from library.options.groups import TrainNetworkOptions
from library.training.caching import cache_latents
from library.training.encoding import model_input
from tests import tiny

ROOT = Path(__file__).parents[1]
ENCODER = "first_stage_model.encoder."
ARRAYS = ("latents", "latents_flipped", "alpha_mask")
both_kinds = pytest.mark.parametrize("kind", ["npz", "packed"])


def write_vae(path: Path, source: Path, change=lambda name, value: value) -> Path:
    """A model whose VAE is as sure of its latents as real ones: deviations of about exp(-5)."""
    weights = load_file(source)
    weights["first_stage_model.quant_conv.bias"][4:] = -10
    save_file({name: change(name, value).contiguous() for name, value in weights.items()}, path)
    return path


@pytest.fixture
def model(tiny_file, tmp_path) -> Path:
    return write_vae(tmp_path / "model.safetensors", tiny_file)


@pytest.fixture
def other_model(tiny_file, tmp_path) -> Path:
    def other(name: str, value: Tensor) -> Tensor:
        return value.roll(1, 0) if name.startswith(ENCODER) else value

    return write_vae(tmp_path / "other.safetensors", tiny_file, other)


def options_of(model: Path, pictures: Path, **changes: object) -> TrainNetworkOptions:
    options = TrainNetworkOptions(
        pretrained_model_name_or_path=str(model), train_data_dir=str(pictures), resolution="96,96",
        enable_bucket=True, min_bucket_reso=64, max_bucket_reso=128, caption_extension=".txt",
        cache_latents_to_disk=True, vae_batch_size=2,
    )  # fmt: skip
    return replace(options, **changes)


@pytest.fixture
def cache(model, pictures, caplog):
    """Cache the latents of a run; returns its dataset, its family, and the line that says what was found."""

    def run(model: Path = model, **changes: object) -> tuple[TrainingDataset, ModelFamily, str]:
        options = options_of(model, pictures, **changes)
        dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)
        family = tiny.load_family(options)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            cache_latents(dataset, family, options, Accelerator(cpu=True))
        return dataset, family, next((m for m in caplog.messages if m.startswith("latents:")), "")

    return run


def are_right(dataset: TrainingDataset, family: ModelFamily) -> bool:
    """Whether all latents are samples of what this VAE makes of these pictures as they are now."""
    for index, path in dataset.latents_paths.items():
        mean, deviation = family.vae.distribution(dataset.image(index)[None])
        distance = (torch.from_numpy(dataset.latents_files.read(path).latents) - mean[0]).abs() / deviation[0]
        if distance.max() > 6:
            return False
    return len(dataset.latents_paths) == 4


def files(pictures: Path, family: str = "sd") -> list[Path]:
    return sorted((pictures / "2_cat").glob(f"*_{family}.npz"))


def contents(pictures: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(pictures)]


def num_cached(pictures: Path) -> int:
    """Pictures with latents in files of one kind, and in those of the other."""
    packs = [read_index(path) for path in pictures.rglob("*.pack")]
    return len(files(pictures)) + len({name for pack in packs for name in pack.names})


def same(one: CachedLatents, other: CachedLatents) -> bool:
    """Whether latents are the same to the bit."""
    return (one.original_size_wh, one.crop_ltrb) == (other.original_size_wh, other.crop_ltrb) and all(
        np.array_equal(a, b) if a is not None and b is not None else a is b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in ARRAYS)
    )


def as_kohya_writes_them(pictures: Path) -> None:
    """The files with kohya's keys alone."""
    for path in files(pictures):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file if not name.startswith("athanor_")}
        np.savez(path, **arrays)


def rewrite(path: Path) -> None:
    """Another picture of the same size."""
    with Image.open(path) as image:
        Image.fromarray(255 - np.array(image)).save(path)


def test_files_have_kohyas_keys_and_four_of_our_own(cache, pictures):
    dataset, family, said = cache()
    assert said == "latents: 0 of 4 pictures have theirs on disk"
    with np.load(files(pictures)[0], allow_pickle=False) as file:
        kohyas = [name for name in file if not name.startswith("athanor_")]
        ours = {name: (file[name].dtype.kind, file[name].shape) for name in file if name.startswith("athanor_")}
    assert kohyas == ["latents", "original_size", "crop_ltrb"]
    assert ours == {
        "athanor_files": ("i", (1, 3)),
        "athanor_resized": ("U", ()),
        "athanor_vae": ("f", (4, 4, 4)),
        "athanor_checksum": ("i", ()),
    }
    assert are_right(dataset, family)


def test_files_of_both_families_lie_side_by_side(cache, tiny_sdxl_file, pictures, tmp_path):
    cache()
    before = contents(pictures)
    sdxl = write_vae(tmp_path / "sdxl.safetensors", tiny_sdxl_file)
    for number in (0, 4):
        dataset, family, said = cache(sdxl)
        assert said == f"latents: {number} of 4 pictures have theirs on disk" and are_right(dataset, family)
    assert contents(pictures) == before and len(files(pictures, "sdxl")) == 4


@pytest.mark.parametrize("kohyas", [False, True])
def test_what_did_not_change_is_used_as_it_is(kohyas, cache, pictures):
    cache()
    if kohyas:
        as_kohya_writes_them(pictures)
    before = contents(pictures)
    dataset, family, said = cache()
    assert said == "latents: 4 of 4 pictures have theirs on disk"
    assert contents(pictures) == before and are_right(dataset, family)


def damage(cache, pictures, other_model) -> dict:
    for path in files(pictures):
        path.write_bytes(path.read_bytes()[:-100])
    return {}


def change_pictures(cache, pictures, other_model) -> dict:
    for path in (pictures / "2_cat").glob("*.png"):
        rewrite(path)
    return {}


CAUSES = {
    "4 damaged": damage,
    "4 of a picture that has changed": change_pictures,
    "4 made with another VAE": lambda cache, pictures, other_model: {"model": other_model},
    "4 of another size": lambda *_: {"resolution": "128,128", "enable_bucket": False},
    "4 resized in another way": lambda *_: {"resize_interpolation": "nearest"},
    "4 without the mirrored picture": lambda *_: {"flip_aug": True},
    "4 without a mask": lambda *_: {"alpha_mask": True},
}


@pytest.mark.parametrize(
    ("kind", "cause"), [*(("npz", cause) for cause in CAUSES), *(("packed", cause) for cause in list(CAUSES)[1:])]
)
def test_what_no_longer_fits_is_made_anew_and_the_cause_is_said(kind, cause, cache, pictures, other_model):
    cache(latent_cache=kind)
    changes = CAUSES[cause](cache, pictures, other_model) | {"latent_cache": kind}
    dataset, family, said = cache(**changes)
    assert said == f"latents: 0 of 4 pictures have theirs on disk; made anew: {cause}"
    assert are_right(dataset, family)
    assert cache(**changes)[2] == "latents: 4 of 4 pictures have theirs on disk"


@both_kinds
def test_another_mask_is_noticed_and_one_that_is_no_longer_wanted_is_not_used(kind, cache, pictures, tmp_path):
    (tmp_path / "masks").mkdir()
    for path in (pictures / "2_cat").glob("*.png"):
        shutil.copy(path, tmp_path / "masks" / path.name)
    masked = {"masked_loss": True, "conditioning_data_dir": str(tmp_path / "masks"), "latent_cache": kind}
    cache(**masked)
    rewrite(tmp_path / "masks" / "picture 0.png")
    assert cache(**masked)[2].endswith("; made anew: 1 of a mask that has changed")
    dataset, _, said = cache(latent_cache=kind)
    assert said == "latents: 4 of 4 pictures have theirs on disk"
    draw = next(draw for batch in dataset.sampler() for draw in batch)
    assert dataset[draw].latents is not None and dataset[draw].alpha_mask is None


@both_kinds
def test_a_copied_dataset_keeps_its_latents(kind, cache, pictures):
    cache(latent_cache=kind)
    for path in (pictures / "2_cat").iterdir():
        os.utime(path, (2e9, 2e9) if path.suffix == ".png" else (1e9, 1e9))
    assert cache(latent_cache=kind)[2] == "latents: 4 of 4 pictures have theirs on disk"


@pytest.mark.parametrize("kohyas", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_encoder_is_known_in_another_format_and_with_another_decoder(
    dtype, kohyas, cache, pictures, tiny_file, tmp_path
):
    def rounded(name: str, value: Tensor) -> Tensor:
        return (value * 2 if ".decoder." in name else value).to(dtype)

    cache()
    if kohyas:
        as_kohya_writes_them(pictures)
    said = cache(write_vae(tmp_path / "rounded.safetensors", tiny_file, rounded))[2]
    assert said == "latents: 4 of 4 pictures have theirs on disk"


def test_kohyas_latents_of_another_vae_are_found_out_by_encoding_a_few(cache, pictures, other_model):
    cache(other_model)
    as_kohya_writes_them(pictures)
    dataset, family, said = cache()
    assert said == "latents: 0 of 4 pictures have theirs on disk; made anew: 4 made with another VAE"
    assert are_right(dataset, family)


def test_kohyas_latents_that_are_older_than_the_picture_are_made_anew(cache, pictures):
    cache()
    as_kohya_writes_them(pictures)
    os.utime(pictures / "2_cat" / "picture 1.png", (2e9, 2e9))
    assert cache()[2].endswith("3 of 4 pictures have theirs on disk; made anew: 1 of a picture that has changed")


def test_our_keys_do_not_count_where_another_program_has_replaced_the_latents(cache, pictures, other_model):
    """Kohya adds to a file key by key."""
    cache()
    ours = [dict(np.load(path)) for path in files(pictures)]
    cache(other_model)
    for path, arrays in zip(files(pictures), ours, strict=True):
        with np.load(path) as file:
            latents = file["latents"]
        np.savez(path, **arrays | {"latents": latents})
    assert cache()[2].endswith("; made anew: 4 made with another VAE")


def test_trusted_files_are_not_read(cache, pictures):
    cache()
    damage(cache, pictures, None)
    files(pictures)[0].unlink()
    assert cache(skip_cache_check=True)[2] == "latents: 3 of 4 pictures have theirs on disk"


@both_kinds
def test_an_interrupted_run_goes_on_where_it_was(kind, cache, pictures, monkeypatch):
    encode, calls = Vae.encode, []

    def stopped(vae: Vae, images: Tensor, noise_like: Callable[[Tensor], Tensor]) -> Tensor:
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(vae, images, noise_like)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Vae, "encode", stopped)
        cache(latent_cache=kind)
    assert num_cached(pictures) == 2
    dataset, family, said = cache(latent_cache=kind)
    assert said == "latents: 2 of 4 pictures have theirs on disk" and are_right(dataset, family)


def test_the_number_of_threads_and_of_pictures_at_once_changes_no_bit(cache, pictures):
    written = []
    for workers, batch_size in ((0, 1), (8, 1), (8, 3)):
        cache(max_data_loader_n_workers=workers, vae_batch_size=batch_size, flip_aug=True)
        written.append([read_latents(path) for path in files(pictures)])
        for path in files(pictures):
            path.unlink()
    for alone, threaded, batched in zip(*written, strict=True):
        assert np.array_equal(alone.latents, threaded.latents)
        assert np.array_equal(alone.latents_flipped, threaded.latents_flipped)
        assert np.allclose(alone.latents, batched.latents, atol=1e-5)


def test_bytes_become_numbers_to_the_bit_as_they_do_without_cached_latents():
    pixels = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, 16, 16, 3)
    assert np.array_equal(model_input(pixels, torch.device("cpu"))[0].numpy(), to_model_input(pixels[0]))


def test_a_picture_that_broke_is_named_and_what_was_made_before_it_stays(model, pictures):
    options = options_of(model, pictures, vae_batch_size=1, enable_bucket=False)
    dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=4)
    last = dataset.scanned.records[-1].path
    last.write_bytes(last.read_bytes()[:200])
    with pytest.raises(UserError, match=f"1 picture cannot be read: .*{last.name}"):
        cache_latents(dataset, tiny.load_family(options), options, Accelerator(cpu=True))
    assert len(files(pictures)) == 3 and all(read_latents(path) for path in files(pictures))
    assert not list(pictures.glob("2_cat/.*.tmp*"))


def test_latents_that_cannot_be_written_are_one_sentence(cache, pictures):
    cache()
    path = files(pictures)[-1]
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=f"latents cannot be written to .*{path.name}: .*; --cache_latents alone keeps"):
        cache()
    assert not list(pictures.glob("2_cat/.*.tmp*"))


@both_kinds
def test_one_picture_in_two_sizes_has_one_file_and_the_right_latents_twice(kind, cache, pictures, tmp_path):
    config = tmp_path / "dataset.toml"
    folder = (pictures / "2_cat").as_posix()
    config.write_text(
        "".join(
            f"[[datasets]]\nresolution = {size}\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
            for size in (64, 128)
        ),
        encoding="utf-8",
    )
    for _ in range(2):
        dataset, _, _ = cache(
            dataset_config=str(config), train_data_dir=None, enable_bucket=False, latent_cache=kind
        )  # fmt: skip
        examples = [dataset[draw] for batch in dataset.sampler() for draw in batch]
        assert {example.target_size_hw for example in examples} == {(64, 64), (128, 128)}
        assert all(tuple(e.latents.shape[1:]) == tuple(side // 8 for side in e.target_size_hw) for e in examples)
    assert len(dataset.latents_paths) == len(dataset.latents) == 4


def other_kind(kind: str) -> str:
    return "npz" if kind == "packed" else "packed"


@pytest.mark.parametrize("kohyas", [False, True])
@both_kinds
def test_what_is_in_files_of_the_other_kind_is_not_made_again(kind, kohyas, cache, pictures, monkeypatch):
    """Bits, origins and masks move; and what does not fit stays behind."""
    options = dict(flip_aug=True, alpha_mask=True)
    if kohyas:
        cache(**options)
        as_kohya_writes_them(pictures)
        if kind == "npz":
            cache(latent_cache="packed", **options)
            for path in files(pictures):
                path.unlink()
    before, _, _ = cache(latent_cache=other_kind(kind), **options)
    wanted = {index: before.latents_files.read(path) for index, path in before.latents_paths.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Vae, "encode", lambda *_: pytest.fail("encoded again"))
        after, family, said = cache(latent_cache=kind, **options)
    assert said == "latents: 4 of 4 pictures have theirs on disk"
    for path in (pictures / "2_cat").glob("*.npz" if kind == "packed" else "*.pack"):
        path.unlink()
    assert cache(latent_cache=kind, **options)[2] == "latents: 4 of 4 pictures have theirs on disk"
    assert all(same(after.latents_files.read(after.latents_paths[index]), wanted[index]) for index in wanted)
    origins = [after.latents_files.read_with_origin(path)[1] for path in after.latents_paths.values()]
    assert [origin is None for origin in origins] == [kohyas] * 4
    os.utime(pictures / "2_cat" / "picture 1.png", (2e9, 2e9))
    rewrite(pictures / "2_cat" / "picture 2.png")
    assert cache(latent_cache=other_kind(kind), **options)[2].startswith(
        "latents: 2 of 4" if kohyas else "latents: 3 of 4"
    )


@pytest.mark.slow
@both_kinds
def test_two_processes_share_the_work_on_files(kind, cache, model, pictures, tmp_path):
    arguments = tiny.arguments(
        model, pictures, tmp_path / "out", cache_latents_to_disk=True, latent_cache=kind
    )  # fmt: skip
    world = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "train_network.py", *arguments],
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in ("0", "1")
    ]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert "caching latents: 100%" in messages[0] and "2/2" in messages[0]
    dataset, family, said = cache(latent_cache=kind)
    assert said == "latents: 4 of 4 pictures have theirs on disk" and are_right(dataset, family)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
