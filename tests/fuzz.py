"""Damaged inputs for tests/test_fuzz.py: a seeded mutator of bytes, and for each kind of file whole ones and a reader.

A reader does with a file what a run does, as far as that needs no model; it may end in a UserError, and in nothing
else.
"""

import io
import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from library.dataset import cache, text_cache
from library.dataset.audit_memory import AuditMemory, caption_digests
from library.dataset.buckets import bucket_settings, choose_bucket
from library.dataset.cache import Origin
from library.dataset.cache_check import WantedLatents, examine
from library.dataset.captions import process_caption
from library.dataset.config import SubsetOptions
from library.dataset.dataset_config import read_dataset_config
from library.dataset.file_marks import FileMark
from library.dataset.images import load_image, resize_and_crop
from library.dataset.index_file import BROKEN, Remembered, StoredIndex, packed
from library.dataset.info_cache import read_sizes
from library.dataset.latent_pack import PackWriter
from library.dataset.metadata_file import read_metadata_file
from library.dataset.pack_files import packed_names
from library.dataset.packed_latents import PackedLatents
from library.dataset.picture_index import NAME as INDEX_NAME
from library.dataset.picture_index import PictureIndex
from library.dataset.scan import scan, verify_pictures
from library.errors import UserError
from library.families.agreement import check_clip_skip, model_warnings
from library.families.checkpoint_files import open_checkpoint
from library.families.detect import inspect_checkpoint
from library.files import MACHINE
from library.given_files import check_network
from library.network_files import read_weights
from library.options.cli import read_options
from library.options.groups import LoggingOptions, TrainNetworkOptions
from library.training.losses import LossRecorder
from library.training.plan import StepPlan
from library.training.prompts import prompts_of
from library.training.resuming import read_state
from library.training.saving import STATE_FILE, LoopState
from library.training.tracker_checks import read_tracker_config
from networks.lora_arguments import check_ranks

# What text files are damaged with, beside random bytes.
TOKENS = [
    *(b"\x00", b"\n", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"'", b'"', b'"""', b"\\", b"=", b"[", b"]"),
    *(b"[[", b"{", b"}", b",", b"nan", b"inf", b"-1", b"1e999", b"9" * 5000, b"null", b"true", b"../../", b"\\ud800"),
    *(b"%", b"#", b"[" * 3000, b'{"a":' * 3000, b"--", b"1979-05-27", b"0x", b"\xe2\x80\xa8", b"\xb0\xa1", b" --w 0"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three damages: bits flipped, cut off, bytes put in, pieces doubled, moved or taken out."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                flipped = bytearray(data)
                for place in rng.sample(range(len(data)), min(len(data), rng.choice((1, 1, 4, 16)))):
                    flipped[place] ^= 1 << rng.randrange(8)
                data = bytes(flipped)
            case 1:
                data = data[:at] if rng.random() < 0.5 else data[:at] + data[at + length :]
            case 2:
                data = data[:at] + rng.randbytes(length) + data[at:]
            case 3:
                data = data[:at] + rng.choice(TOKENS) + data[at:]
            case 4:
                data = data[:at] + data[at : at + length] * rng.choice((2, 2, 100)) + data[at + length :]
            case 5:
                data = data[:at] + struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1))) + data[at + 8 :]
    return data


@dataclass(frozen=True)
class Kind:
    """A kind of input: the name of its file, whole ones, and who reads it, given the file and a folder beside it."""

    file: str
    whole: Callable[[], list[bytes]]
    read: Callable[[Path], object]


def options_of(path: Path) -> TrainNetworkOptions:
    return read_options(TrainNetworkOptions, ["--config_file", str(path)])


def run_options(path: Path, **more: object) -> TrainNetworkOptions:
    """Options of a run, without reading any."""
    return TrainNetworkOptions(resolution="64,64", enable_bucket=True, min_bucket_reso=64, max_bucket_reso=128, **more)


def _configs() -> list[bytes]:
    lines = {
        "pretrained_model_name_or_path": "model.safetensors",
        "train_data_dir": "data",
        "resolution": "512,512",
        "output_dir": "out",
        "output_name": "猫",
        "learning_rate": 1e-4,
        "unet_lr": 0.0001,
        "max_train_epochs": 3,
        "network_args": ["conv_dim=4", "conv_alpha=1"],
        "optimizer_args": ["weight_decay=0.01", "betas=0.9,0.99"],
        "enable_bucket": True,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "sample_prompts": "a cat --n blurry",
    }
    flat = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())
    shell = '[model]\npretrained_model_name_or_path = "a"\nv2 = false\n[more]\nepoch = 3\nlora_type = "lora"\n'
    script = 'model_train_type = "sd-lora"\npositive_prompts = "x"\nui_custom_params = "seed = 3"\n'
    windows = flat.replace("\n", "\r\n").encode("utf-8-sig")
    return [flat.encode(), windows, (flat + shell).encode(), (flat + script).encode()]


def _json_configs() -> list[bytes]:
    base = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "out", "resolution": "64"}
    gui = {"LoRA_type": "Standard", "lr_scheduler": "cosine", "epoch": 3, "lr_warmup": 10, "xformers": "xformers"}
    gui |= {"additional_parameters": "--seed 3 --v2", "optimizer": "AdamW", "unet_lr": 1e-4}
    return [json.dumps(base | gui, indent=1).encode(), json.dumps(base | {"seed": None, "unet_lr": 1}).encode()]


def _dataset_configs() -> list[bytes]:
    text = (
        "[general]\nshuffle_caption = true\ncaption_extension = '.txt'\nkeep_tokens = 1\n\n[[datasets]]\n"
        "resolution = [64, 64]\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\n"
        "[[datasets.subsets]]\nimage_dir = 'data'\nnum_repeats = 2\nclass_tokens = '猫'\n"
        "face_crop_aug_range = [1.0, 2.0]\n[datasets.subsets.custom_attributes]\nx = 1\n"
    )
    return [text.encode(), text.encode("utf-8-sig").replace(b"\n", b"\r\n")]


def read_datasets(path: Path) -> None:
    specs, _, _ = read_dataset_config(run_options(path, dataset_config=str(path)))
    for spec in specs:
        settings = bucket_settings(spec)
        choose_bucket((70, 90), settings.resolutions, settings.resolution_wh, settings.step, settings.no_upscale)


def _metadata() -> list[bytes]:
    entries = {
        "a.png": {"caption": "one 猫", "tags": "x, y", "image_size": [64, 64]},
        "b": {"tags": "z"},
        "../data/c.png": {"caption": "c"},
    }
    return [json.dumps(entries, ensure_ascii=False).encode(), json.dumps(entries, indent=2).encode("utf-8-sig")]


def read_metadata(path: Path) -> None:
    subset = SubsetOptions(image_dir=path.parent / "data", metadata_file=path, enable_wildcard=True)
    if problems := read_metadata_file(subset, latents_suffice=True).problems:
        raise UserError(*problems)


def _captions() -> list[bytes]:
    text = "1girl, {{solo}}, {red|blue} hair, ||| 猫 (cat:1.2), [dog]\nsecond line\n"
    return [text.encode(), text.encode("utf-8-sig"), text.encode("gbk"), text.encode("utf-16")]


def read_caption(path: Path) -> None:
    subset = SubsetOptions(
        image_dir=path.parent, caption_extension=".txt", shuffle_caption=True, enable_wildcard=True,
        keep_tokens_separator="|||", caption_tag_dropout_rate=0.1,
    )  # fmt: skip
    (record,) = scan([subset]).records
    text = process_caption(record.caption, subset, step=0, epoch=1, max_train_steps=1, rng=random.Random(0))
    text.encode()


def _prompts() -> list[bytes]:
    return ["# sizes\na cat, 猫 --n blurry --w 512 --h 768 --d 1 --l 7.5 --s 28 --ss euler_a\nb --g 3\n".encode()]


def _toml_prompts() -> list[bytes]:
    return [b'[prompt]\nwidth = 512\nscale = 7.5\n[[prompt.subset]]\nprompt = "a"\nseed = 1\n']


def _json_prompts() -> list[bytes]:
    return [json.dumps(["a --w 512", {"prompt": "b", "seed": 3, "scale": 7.5, "guidance_scale": 1}]).encode()]


def read_prompts(path: Path) -> None:
    for prompt in prompts_of(str(path)):
        f"{prompt.prompt}{prompt.negative_prompt}".encode()


def _pictures(*formats: str, modes: tuple[str, ...] = ("RGB", "L", "RGBA")) -> Callable[[], list[bytes]]:
    def make() -> list[bytes]:
        noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation
        made = []
        for format_name in formats:
            for mode in modes:
                file = io.BytesIO()
                Image.fromarray(noise).convert(mode).save(file, format_name, exif=exif)
                made.append(file.getvalue())
        return made

    return make


def read_picture(path: Path) -> None:
    subset = SubsetOptions(image_dir=path.parent, caption_extension=".txt")
    (record,) = scan([subset]).records
    verify_pictures([record], num_threads=1)
    settings = bucket_settings(run_options(path))
    choice = choose_bucket(record.size_wh, settings.resolutions, settings.resolution_wh, settings.step, False)
    if max(choice.resized_wh) < 2000:
        pixels, _ = resize_and_crop(load_image(path), choice.resized_wh, choice.bucket_wh)
        assert pixels.shape == (choice.bucket_wh[1], choice.bucket_wh[0], 3)


def _indexes() -> list[bytes]:
    """Of the pictures that a test stands beside, two of them with captions."""
    folder, index = Path("data"), PictureIndex()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"{name} 猫", encoding="utf-8")
    records = scan([SubsetOptions(image_dir=folder, caption_extension=".txt")], index=index).records
    verify_pictures(records, num_threads=1, index=index)
    memory = AuditMemory()
    memory.answer("same", bytes(16), lambda: [["a.png", "b.png"]], lambda _: True)
    memory.token_counts(caption_digests([record.caption for record in records], ""), lambda new: dict.fromkeys(new, 7))
    files = index.folder(folder)
    return [packed(Remembered(files.pictures, files.captions, memory.packed()))]


def read_index(path: Path) -> None:
    """What is read beside a damaged index is what is read without it."""
    subset = SubsetOptions(image_dir=path.parent, caption_extension=".txt")
    found = []
    for index in (PictureIndex(), _without_memory(path.parent)):
        records = scan([subset], index=index).records
        found.append((records, verify_pictures(records, num_threads=1, index=index)))
    assert found[0] == found[1]
    with suppress(*BROKEN):
        AuditMemory(StoredIndex(path.read_bytes()).audit)
        return
    raise UserError("the index is ignored")


def _without_memory(folder: Path) -> PictureIndex:
    index = PictureIndex()
    index.folder(folder).pictures.clear()
    index.folder(folder).captions.clear()
    return index


def _latents() -> list[bytes]:
    arrays = {
        "latents": np.ones((4, 8, 8), np.float32),
        "original_size": np.array((64, 64)),
        "crop_ltrb": np.zeros(4),
        "latents_flipped": np.ones((4, 8, 8), np.float32),
        "athanor_checksum": np.array(3),
    }
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, **arrays)
    np.savez_compressed(packed, **arrays)
    return [plain.getvalue(), packed.getvalue()]


def read_latents(path: Path) -> None:
    picture = path.with_name("picture.png")
    if not picture.exists():
        Image.new("RGB", (64, 64)).save(picture)
        os.utime(picture, (0, 0))  # older than its latents
    wanted = WantedLatents(picture, (64, 64), (64, 64), (0, 0, 0, 0), "64x64", True, False, None)
    cache.latents_path(picture, (64, 64))
    finding = examine(path, wanted)
    if finding.reason is None:
        torch.from_numpy(cache.read_latents(path).latents).float()
    else:
        raise UserError(finding.reason)


PACK_NAME = f".athanor_latents_sd-000001-{MACHINE}-{2**22 + 1}-0123abcd.pack"  # of a process that there cannot be


def _packs() -> list[bytes]:
    """One that is finished, and one whose writer was killed."""
    with TemporaryDirectory() as folder:
        writer = PackWriter(Path(folder, PACK_NAME))
        origin = Origin(FileMark(1, 2, 3), None, "64x64", np.ones((4, 4, 4)))
        for name in ("picture_0064x0064_sd.npz", "b.npz"):
            array = np.ones((4, 8, 8), np.float32)
            writer.add(name, cache.CachedLatents(array, (64, 64), (0, 0, 0, 0), array), origin)
        torn = writer.path.read_bytes()
        writer.finish()
        return [writer.path.read_bytes(), torn]


def read_packs(path: Path) -> None:
    folder, files = str(path.parent), PackedLatents("sd")
    wanted = WantedLatents(path, (64, 64), (64, 64), (0, 0, 0, 0), "64x64", True, False, None, is_gone=True)
    packed_names(os.listdir(folder), folder, "sd")
    try:
        files.clear_up([folder])
        files.tidy([folder])
        for name in ("picture_0064x0064_sd.npz", "b.npz"):
            place = os.path.join(folder, name)
            (finding,) = files.examine([(place, wanted)])
            if finding.reason:
                raise UserError(finding.reason)
            assert (files.read(place).latents == 1).all()
    finally:
        for other in path.parent.glob("*.pack"):  # notes of damage
            other.unlink()
        path.touch()


def _texts() -> list[bytes]:
    arrays = {"hidden_state1": np.ones((7, 4)), "hidden_state2": np.ones((7, 8)), "pool2": np.ones(8)}
    file = io.BytesIO()
    np.savez(file, athanor_checksum=np.array(3), **{key: value.astype(np.float32) for key, value in arrays.items()})
    return [file.getvalue()]


def read_texts(path: Path) -> None:
    right = {"hidden_state1": (7, 4), "hidden_state2": (7, 8), "pool2": (8,)}
    wanted = text_cache.WantedText("a", False, True, None, path.with_name("a.txt"))
    try:
        shapes, origin = text_cache.examine_file(path)
    except cache.DAMAGED as error:
        raise UserError("damaged") from error
    if reason := text_cache.misfit(path, shapes, origin, wanted, right):
        raise UserError(reason)
    for array in text_cache.read_text(path).values():
        torch.from_numpy(array).float()


def _network_weights() -> dict[str, torch.Tensor]:
    return {
        "lora_unet_mid_block_attn2_to_k.lora_down.weight": torch.ones(4, 768),
        "lora_unet_mid_block_attn2_to_k.lora_up.weight": torch.ones(8, 4),
        "lora_unet_mid_block_attn2_to_k.alpha": torch.tensor(4.0),
    }


def _networks() -> list[bytes]:
    return [safetensors.torch.save(_network_weights(), {"ss_network_dim": "4"})]


def _pickled_networks() -> list[bytes]:
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(_network_weights(), new)
    torch.save(_network_weights(), old, _use_new_zipfile_serialization=False)
    return [new.getvalue(), old.getvalue()]


def read_network(path: Path) -> None:
    if shapes := check_network(str(path), "--network_weights", None, True):
        check_ranks(shapes, str(path), 4, {})
    read_weights(path)


def _checkpoint_weights() -> dict[str, torch.Tensor]:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(4, 4),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias": torch.ones(4),
    }


def _checkpoints() -> list[bytes]:
    return [safetensors.torch.save(_checkpoint_weights())]


def _pickled_checkpoints() -> list[bytes]:
    file = io.BytesIO()
    torch.save({"state_dict": _checkpoint_weights(), "global_step": 3}, file)
    return [file.getvalue()]


def read_checkpoint(path: Path) -> None:
    info = inspect_checkpoint(str(path))
    options = TrainNetworkOptions(clip_skip=1)
    if info.kind == "sd1":
        check_clip_skip(options, info)
        model_warnings(options, info)
    for mapped in (True, False):
        dict(open_checkpoint(path, mapped))


def _folder_configs() -> list[bytes]:
    config = {"_class_name": "StableDiffusionPipeline", "hidden_act": "gelu", "num_hidden_layers": 12}
    return [json.dumps(config | {"in_channels": 4, "prediction_type": "epsilon"}).encode()]


def read_model_folder(path: Path) -> None:
    """Each of the files of a folder that are looked at is the same."""
    data = path.read_bytes()
    for name in ("unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(data)
    info = inspect_checkpoint(str(path.parent))
    if info.kind in ("sd1", "sd2"):
        check_clip_skip(TrainNetworkOptions(clip_skip=1), info)
        model_warnings(TrainNetworkOptions(), info)


def _sizes() -> list[bytes]:
    return [json.dumps({"data/a.png": {"caption": "c", "resolution": [64, 64]}}).encode()]


def read_noted_sizes(path: Path) -> None:
    _, notes = read_sizes(path.parent)
    if notes:
        raise UserError(*notes)


def _states() -> list[bytes]:
    ours = LoopState(epoch=2, step=10, batch=3, seed=5, stops=[7], losses=LossRecorder([0.5, 0.25], window=2))
    return [json.dumps(ours.facts()).encode(), b'{"current_epoch": 2, "current_step": 10}']


def read_resumed(path: Path) -> None:
    plan = StepPlan(12, batches_per_epoch=6, num_processes=1, accumulation=2, num_epochs=4, max_train_steps=12)
    state = read_state(path.parent, plan, seed=1)
    assert all(isinstance(value, int) for value in (state.epoch, state.step, state.batch, state.seed))


def _trackers() -> list[bytes]:
    return [b'[wandb]\nproject = "x"\n[wandb.settings]\nname = "y"\n[tensorboard]\nflush_secs = 3\n']


def read_trackers(path: Path) -> None:
    read_tracker_config(LoggingOptions(log_tracker_config=str(path)))


KINDS = {
    "configuration in TOML": Kind("lora.toml", _configs, options_of),
    "configuration in JSON": Kind("lora.json", _json_configs, options_of),
    "dataset configuration": Kind("datasets.toml", _dataset_configs, read_datasets),
    "metadata file": Kind("meta.json", _metadata, read_metadata),
    "caption": Kind("picture.txt", _captions, read_caption),
    "prompts in lines": Kind("prompts.txt", _prompts, read_prompts),
    "prompts in TOML": Kind("prompts.toml", _toml_prompts, read_prompts),
    "prompts in JSON": Kind("prompts.json", _json_prompts, read_prompts),
    "picture in PNG": Kind("picture.png", _pictures("PNG"), read_picture),
    "picture in JPEG": Kind("picture.jpg", _pictures("JPEG", modes=("RGB", "L", "CMYK")), read_picture),
    "picture in WebP": Kind("picture.webp", _pictures("WEBP", modes=("RGB", "RGBA")), read_picture),
    "picture of another format": Kind("picture.bmp", _pictures("BMP", "GIF", "TIFF", modes=("RGB", "L")), read_picture),
    "latents on disk": Kind("picture_0064x0064_sd.npz", _latents, read_latents),
    "latents in packs": Kind(f"packs/{PACK_NAME}", _packs, read_packs),
    "texts on disk": Kind("picture_te_outputs.npz", _texts, read_texts),
    "network file": Kind("net.safetensors", _networks, read_network),
    "network file in pickle": Kind("net.pt", _pickled_networks, read_network),
    "checkpoint": Kind("model.safetensors", _checkpoints, read_checkpoint),
    "checkpoint in pickle": Kind("model.ckpt", _pickled_checkpoints, read_checkpoint),
    "model folder": Kind("model_index.json", _folder_configs, read_model_folder),
    "noted sizes": Kind("metadata_cache.json", _sizes, read_noted_sizes),
    "index of pictures": Kind(f"data/{INDEX_NAME}", _indexes, read_index),
    "state": Kind(STATE_FILE, _states, read_resumed),
    "tracker configuration": Kind("trackers.toml", _trackers, read_trackers),
}
