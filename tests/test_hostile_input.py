"""Files made to do harm, or that nobody expected: no code of theirs runs, nothing hangs, nothing is cryptic."""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset import cache, text_cache
from library.dataset.buckets import bucket_settings, choose_buckets, registered_repeats
from library.dataset.config import SubsetOptions
from library.dataset.images import load_image
from library.dataset.info_cache import read_sizes
from library.dataset.repeat_folders import list_repeat_folders
from library.dataset.scan import ImageRecord, scan, verify_pictures
from library.errors import UserError
from library.families.checkpoint_files import open_checkpoint
from library.families.checkpoints import folder_part
from library.families.detect import inspect_checkpoint
from library.given_files import check_network
from library.network_files import read_weights
from library.options.cli import read_options
from library.options.groups import LoggingOptions, SavingOptions, TrainNetworkOptions
from library.training.prompts import prompts_of

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


def refusal(function, *arguments) -> str:
    """The sentence that a call ends in."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def read_datasets(folder: Path, **more: object):
    """The records of a folder, as a run finds and decodes them."""
    records = scan([SubsetOptions(image_dir=folder, caption_extension=".txt", **more)]).records
    verify_pictures(records, num_threads=1)
    return records


# --- pickles -----------------------------------------------------------------------------------------------------


class Payload:
    """What a pickle would run: it makes a file."""

    def __init__(self, marker: Path, function=os.mkdir):
        self.call = function, (str(marker),)

    def __reduce__(self):
        return self.call


def torch_zip(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": payload}}, path)


def torch_legacy(path: Path, payload: Payload) -> None:
    torch.save({"a": payload}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


def numpy_archive(path: Path, payload: Payload) -> None:
    names = ("latents", "original_size", "crop_ltrb", *text_cache.KEYS)
    with open(path, "wb") as file:
        np.savez(file, **{name: np.array([payload], dtype=object) for name in names})


READERS = {
    "base model": ("model.ckpt", lambda path: [inspect_checkpoint(str(path)), open_checkpoint(path)]),
    "base model, opened at once": ("model.ckpt", open_checkpoint),
    "network": ("net.pt", lambda path: [check_network(str(path), "--network_weights", None, True), read_weights(path)]),
    "network, opened at once": ("net.bin", read_weights),
    "latents": ("a_0064x0064_sd.npz", cache.read_latents),
    "texts": ("a_te_outputs.npz", text_cache.read_text),
}


@pytest.mark.parametrize("write", [torch_zip, torch_legacy, plain_pickle, numpy_archive])
@pytest.mark.parametrize("place", READERS)
@pytest.mark.parametrize("function", [os.mkdir, os.system])
def test_no_code_of_a_pickle_runs(place, write, function, tmp_path):
    name, read = READERS[place]
    marker = tmp_path / "pwned"
    write(tmp_path / name, Payload(marker if function is os.mkdir else f"echo > '{marker}'", function))
    sentence = refusal(read, tmp_path / name)
    assert name in sentence
    assert not marker.exists()


def test_the_payload_of_these_tests_would_run(tmp_path):
    plain_pickle(tmp_path / "a", Payload(tmp_path / "pwned"))
    pickle.loads((tmp_path / "a").read_bytes())
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_no_code_of_a_model_folder_runs(part, tiny_folder, tmp_path):
    from library.families.checkpoints import SD1_TEXT, AutoencoderKL, UNet2DConditionModel

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": SD1_TEXT.model_class}
    folder = tmp_path / part
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_folder / part / "config.json").read_bytes())
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch_zip(folder / name, Payload(tmp_path / "pwned"))
    assert str(folder) in refusal(folder_part, classes[part], folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"block_out_channels": "x"}', b"\xff"])
def test_a_broken_model_folder_is_a_sentence(content, tiny_folder, tmp_path):
    from library.families.checkpoints import UNet2DConditionModel

    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    assert str(tmp_path) in refusal(folder_part, UNet2DConditionModel, tmp_path)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("write", [torch_zip, torch_legacy, plain_pickle])
def test_no_code_of_a_state_runs(name, write, tmp_path):
    from accelerate import Accelerator

    from library.training.restoring import load_state
    from library.training.saving import LoopState
    from library.training.state_files import copy_state

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(
        model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    )  # fmt: skip
    copy_state(accelerator, LoopState()).write(tmp_path / "state")
    write(tmp_path / "state" / name, Payload(tmp_path / "pwned"))
    try:
        load_state(accelerator, tmp_path / "state")
    except UserError as error:
        assert "--resume" in str(error)
    assert not (tmp_path / "pwned").exists()


def test_a_module_of_another_project_is_given_no_pickle_that_runs_code(tmp_path):
    """LyCORIS loads .pt files as torch does by default, which before torch 2.6 runs their code."""
    from types import SimpleNamespace

    from networks.external import ExternalAlgorithm

    def create_network_from_weights(multiplier, file, *models, **arguments):
        return torch.load(file, weights_only=False)

    torch_zip(tmp_path / "net.pt", Payload(tmp_path / "pwned"))
    module = SimpleNamespace(__name__="theirs", create_network_from_weights=create_network_from_weights)
    options = SimpleNamespace(network_weights=str(tmp_path / "net.pt"))
    models = SimpleNamespace(vae=None, text_encoder=None, unet=None)
    assert "net.pt" in refusal(ExternalAlgorithm(module)._network_of_file, models, options, {})
    assert not (tmp_path / "pwned").exists()


# --- archives and headers ----------------------------------------------------------------------------------------


def test_an_archive_that_unpacks_to_more_than_it_is_is_no_checkpoint(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(10**7))
    assert path.stat().st_size < 10**5
    assert "no torch checkpoint" in refusal(inspect_checkpoint, str(path))


def test_names_in_archives_lead_nowhere(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    weights = {"lora_unet_a.lora_down.weight": torch.ones(4, 4)}
    torch.save(weights, folder / "net.pt")
    with zipfile.ZipFile(folder / "net.pt", "a") as archive:
        archive.writestr("../../outside.txt", "x")
    with open(folder / "a.npz", "wb") as file:
        np.savez(file, **{"../../outside": np.ones(3)})
    for read, name in ((read_weights, "net.pt"), (cache.read_latents, "a.npz")):
        try:
            read(folder / name)
        except UserError as error:
            assert name in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", "net.pt"]


def safetensors_file(path: Path, header: bytes, data: bytes = bytes(64), header_size: int | None = None) -> Path:
    size = len(header) if header_size is None else header_size
    path.write_bytes(struct.pack("<Q", size) + header + data)
    return path


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


NAME = "lora_unet_mid_block_attn2_to_k.lora_down.weight"
HEADERS = {
    "larger than the file": (b"{}", 2**40),
    "larger than any number": (b"{}", 2**64 - 1),
    "an offset before the start": (f'{{"{NAME}": {entry(offsets=(-16, 0))}}}', None),
    "an offset beyond the end": (f'{{"{NAME}": {entry(offsets=(0, 2**62))}}}', None),
    "offsets the wrong way": (f'{{"{NAME}": {entry(offsets=(16, 0))}}}', None),
    "three offsets": (f'{{"{NAME}": {entry(offsets=(0, 16, 32))}}}', None),
    "overlapping weights": (f'{{"{NAME}": {entry()}, "lora_unet_b.alpha": {entry(offsets=(8, 24))}}}', None),
    "an unknown number format": (f'{{"{NAME}": {entry(dtype="F13")}}}', None),
    "a number format that is a number": (f'{{"{NAME}": {entry(dtype=5)}}}', None),
    "a shape of other size": (f'{{"{NAME}": {entry(shape=(5,))}}}', None),
    "a negative shape": (f'{{"{NAME}": {entry(shape=(-4,))}}}', None),
    "a huge shape": (f'{{"{NAME}": {entry(shape=(2**62, 2**62))}}}', None),
    "a shape of text": (f'{{"{NAME}": {entry(shape="4")}}}', None),
    "half a character": (f'{{"\\ud800{NAME}": {entry()}}}', None),
    "depth": ("[" * 100_000, None),
    "a list": ("[]", None),
    "no JSON": (b"\xff" * 20, None),
    "a number of many digits": (f'{{"{NAME}": {{"shape": [{"9" * 5000}]}}}}', None),
    "no weights of ours": ('{"a": ' + entry() + "}", None),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_of_safetensors_that_lies_is_a_sentence(what, tmp_path):
    header, size = HEADERS[what]
    header = header if isinstance(header, bytes) else header.encode()
    path = safetensors_file(tmp_path / "net.safetensors", header, header_size=size)

    def read(path: Path) -> None:
        check_network(str(path), "--network_weights", None, True)
        read_weights(path)

    assert "net.safetensors" in refusal(read, path)


def test_a_name_that_stands_twice_in_a_header_is_no_harm(tmp_path):
    header = f'{{"{NAME}": {entry()}, "{NAME}": {entry(offsets=(0, 16))}}}'
    path = safetensors_file(tmp_path / "net.safetensors", header.encode(), bytes(16))
    try:
        assert set(read_weights(path)) == {NAME}
    except UserError as error:
        assert "net.safetensors" in str(error)


def test_a_number_format_without_arithmetic_is_a_sentence_however_it_is_read(tmp_path):
    path = safetensors_file(tmp_path / "m.safetensors", f'{{"a": {entry("U64", (2,))}}}'.encode(), bytes(16))
    assert "U64" in refusal(lambda: dict(open_checkpoint(path, mapped=False)))


def test_an_array_that_says_it_is_huge_is_damaged(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**45,)}
    )  # fmt: skip
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("latents", "original_size", "crop_ltrb"):
            archive.writestr(f"{name}.npy", header.getvalue())
    assert "cannot be read" in refusal(cache.read_latents, path)


# --- pictures ----------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A grey PNG that declares a size, whatever its data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image: Image.Image, format_name: str, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **more)
    return file.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(pwned) (w) file\nshowpage\n%%EOF\n"
BAD_PICTURES = {
    "a bomb": (png(60_000, 60_000), "million pixels"),
    "the largest size": (png(2**31 - 1, 2**31 - 1), "million pixels"),
    "no width": (png(0, 5), "cannot be read"),
    "no pixels": (png(64, 64), "cannot be read"),
    "half a picture": (saved(Image.effect_noise((64, 64), 99), "PNG")[:500], "cannot be read"),
    "nothing": (b"", "the file is empty"),
    "text": (b"hello\n", "not a picture"),
    "a page": (b"<html></html>", "not a picture"),
    "PostScript, which Pillow has drawn by a program": (POSTSCRIPT, "not a picture"),
    "a GIF of a size": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x3b", "cannot be read"),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_picture_that_cannot_be_trained_is_named(what, tmp_path):
    data, words = BAD_PICTURES[what]
    (tmp_path / "bad.png").write_bytes(data)
    sentence = refusal(read_datasets, tmp_path)
    assert "bad.png" in sentence and words in sentence


def gradient(mode: str) -> Image.Image:
    """Dark on the left, light on the right, 40 x 20 pixels."""
    return Image.fromarray(np.tile(np.linspace(20, 235, 40).astype(np.uint8), (20, 1))).convert("RGB").convert(mode)


def palette() -> Image.Image:
    return gradient("RGB").convert("P", palette=Image.Palette.ADAPTIVE)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(gradient("L")).astype(np.uint16) * 257)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(gradient("RGB").transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def odd_orientation(value: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(gradient("RGB"), "JPEG", exif=exif, quality=95)


UNUSUAL_PICTURES = {
    "CMYK": saved(gradient("CMYK"), "JPEG", quality=95),
    "16 bits": saved(sixteen_bits(), "PNG"),
    "a palette": saved(palette(), "PNG"),
    "a palette with a transparent colour": saved(palette(), "PNG", transparency=255),
    "grey with alpha": saved(gradient("LA"), "PNG"),
    "turned by its EXIF": turned(),
    "an orientation of 9": odd_orientation(9),
    "an orientation of 0": odd_orientation(0),
    "several frames": saved(gradient("RGB"), "GIF", save_all=True, append_images=[gradient("L")] * 3),
    "several frames of WebP": saved(
        gradient("RGB"), "WEBP", save_all=True, append_images=[gradient("L")] * 3, lossless=True
    ),
    "several pages": saved(gradient("RGB"), "TIFF", save_all=True, append_images=[gradient("L")] * 3),
}


@pytest.mark.parametrize("what", UNUSUAL_PICTURES)
def test_an_unusual_picture_is_seen_as_people_see_it(what, tmp_path):
    (tmp_path / "picture.png").write_bytes(UNUSUAL_PICTURES[what])
    (record,) = read_datasets(tmp_path)
    assert record.size_wh == (40, 20)
    pixels = load_image(record.path)
    assert pixels.shape == (20, 40, 3)
    assert np.abs(pixels[10, :, 0].astype(int) - np.linspace(20, 235, 40)).mean() < 12


def test_a_picture_of_one_pixel_is_trained(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    (record,) = read_datasets(tmp_path)
    (choice,) = choose_buckets([record], bucket_settings(sizes()))
    assert choice.resized_wh == choice.bucket_wh


def sizes(**more: object) -> TrainNetworkOptions:
    return TrainNetworkOptions(resolution="512", enable_bucket=True, **more)


def test_a_line_of_pixels_is_not_enlarged_to_gigabytes():
    record = ImageRecord("line.png", (1, 20_000), "", True, 0)
    assert "line.png" in refusal(choose_buckets, [record], bucket_settings(sizes()))


def test_repeats_that_no_memory_holds_are_a_sentence():
    record = ImageRecord("a.png", (64, 64), "", True, 0)
    assert "there may be" in refusal(registered_repeats, [record], [SubsetOptions(image_dir=None, num_repeats=10**12)])


# --- folders -----------------------------------------------------------------------------------------------------


@posix
def test_what_is_no_file_is_no_picture(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "real.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "real.txt", "real.npz", "metadata_cache.json"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        listening.bind("socket.png")
        (record,) = read_datasets(tmp_path, cache_info=True)
    assert record.path.name == "real.png" and not record.caption_found
    assert cache.latents_path(record.path, record.size_wh).name == "real_0064x0064_sd.npz"
    assert read_sizes(tmp_path)[1]


@posix
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    for name in ("a.npz", "prompts.txt"):
        os.mkfifo(tmp_path / name)
    assert "not a file" in refusal(cache.read_latents, tmp_path / "a.npz")
    assert "not a file" in refusal(prompts_of, str(tmp_path / "prompts.txt"))


@posix
def test_links_in_a_circle_are_no_folders(tmp_path):
    (tmp_path / "10_cat").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "10_cat" / "a.png")
    (tmp_path / "10_circle").symlink_to("10_circle")
    (tmp_path / "10_cat" / "10_up").symlink_to("..")
    assert [folder.path.name for folder in list_repeat_folders("--train_data_dir", tmp_path).folders] == ["10_cat"]


@posix
def test_names_that_are_not_utf8_are_a_sentence(tmp_path):
    try:
        os.mkdir(os.fsencode(tmp_path) + "/10_蓝色".encode("gbk"))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (problem,) = list_repeat_folders("--train_data_dir", tmp_path).problems
    assert "not in UTF-8" in problem


def test_a_deep_path_is_read(tmp_path):
    deep = tmp_path.joinpath(*["folder"] * (20 if os.name == "nt" else 100))
    deep.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(deep / "a.png")
    assert len(read_datasets(deep)) == 1


# --- texts -------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "with a mark": ("猫, 1girl".encode("utf-8-sig"), "猫, 1girl"),
    "UTF-16": ("猫, 1girl".encode("utf-16"), "猫, 1girl"),
    "GBK": ("猫, 1girl, 蓝色的头发".encode("gbk"), "猫, 1girl, 蓝色的头发"),
    "line ends of Windows": (b"a, b\r\nc", "a, b"),
    "line ends of old Macs": (b"a, b\rc", "a, b"),
}
BAD_CAPTIONS = {
    "NUL bytes": (b"a\0b", "neither UTF-8"),
    "UTF-16 without a mark": ("a cat".encode("utf-16-le"), "neither UTF-8"),
    "half of UTF-16": (b"\xff\xfea\0b", "neither UTF-8"),
    "10 MB": (b"a, " * 4_000_000, "larger than 1 MB"),
    "bytes": (b"\xff\xff\xff", "neither UTF-8"),
}


@pytest.mark.parametrize("what", CAPTIONS)
def test_captions_of_other_encodings_are_read(what, tmp_path):
    data, caption = CAPTIONS[what]
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    assert [record.caption for record in read_datasets(tmp_path)] == [caption]


@pytest.mark.parametrize("what", BAD_CAPTIONS)
def test_captions_that_are_none_are_named(what, tmp_path):
    data, words = BAD_CAPTIONS[what]
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    sentence = refusal(read_datasets, tmp_path)
    assert "a.txt" in sentence and words in sentence


RIGHT = 'pretrained_model_name_or_path = "m"\ntrain_data_dir = "t"\nresolution = "64"\noutput_dir = "out"\n'
BAD_CONFIGS = {
    "UTF-16": (RIGHT.encode("utf-16"), r"seems to be in UTF-16"),
    "UTF-16 without a mark": (RIGHT.encode("utf-16-le"), r"NUL bytes"),
    "GBK": (f'{RIGHT}output_name = "我的模型"'.encode("gbk"), r"lora.toml:5: .*seems to be in GBK"),
    "no number": (f"{RIGHT}learning_rate = nan".encode(), r"lora.toml:5: learning_rate must be a number, got nan"),
    "infinity": (f"{RIGHT}unet_lr = -inf".encode(), r"lora.toml:5: unet_lr must be a number"),
    "a huge number": (f"{RIGHT}network_dim = {'9' * 400}".encode(), r"network_dim must be a whole number"),
    "a number of many digits": (f"{RIGHT}network_dim = {'9' * 5000}".encode(), r"lora.toml:5"),
    "a huge side": (f"{RIGHT}max_bucket_reso = 99999999".encode(), r"max_bucket_reso must be at most"),
    "a huge size": (RIGHT.replace("64", "9999999999").encode(), r"resolution must be a size"),
    "a long string": (f'{RIGHT}training_comment = "{"x" * 10**7}"'.encode(), r"10000\d+ characters"),
    "depth": (f"{RIGHT}a = {'[' * 5000}{']' * 5000}".encode(), r"not valid TOML"),
    "a date": (f"{RIGHT}output_name = 1979-05-27".encode(), r"output_name must be text"),
    "a table for text": (f"{RIGHT}[a.b]\noutput_name = 3\n".encode(), r""),
    "another folder": (f'{RIGHT}output_name = "../../x"'.encode(), r"output_name must be a name without folders"),
    "another folder of Windows": (rf"{RIGHT}output_name = '..\x'".encode(), r"output_name must be a name without"),
    "a path": (f'{RIGHT}output_name = "/etc/x"'.encode(), r"output_name must be a name without folders"),
    "a line end": (f'{RIGHT}output_name = "a\\nb"'.encode(), r"output_name must be a name without control characters"),
    "NUL": (f'{RIGHT}output_name = "a\\u0000b"'.encode(), r"output_name must be a name without control characters"),
    "NUL in a path": (f'{RIGHT}vae = "a\\u0000b"'.encode(), r"vae must be a path without control characters"),
    "a long path": (f'{RIGHT}vae = "{"a" * 5000}"'.encode(), r"vae must be a path"),
    "a device": (f'{RIGHT}output_name = "con"'.encode(), r"a device"),
    "a device with an ending": (f'{RIGHT}output_name = "NUL.v1"'.encode(), r"a device"),
    "a long name": (f'{RIGHT}output_name = "{"猫" * 100}"'.encode(), r"at most 180 bytes"),
    "curves elsewhere": (f'{RIGHT}log_prefix = "../../x"'.encode(), r"log_prefix must be a name"),
    "curves anywhere": (f'{RIGHT}log_tracker_name = "/tmp/x"'.encode(), r"log_tracker_name must be a name"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_hostile_configuration_is_sentences(what, tmp_path):
    import re

    data, words = BAD_CONFIGS[what]
    (tmp_path / "lora.toml").write_bytes(data)
    try:
        read_options(TrainNetworkOptions, ["--config_file", str(tmp_path / "lora.toml")])
    except UserError as error:
        assert re.search(words, str(error)), str(error)[:2000]
    else:
        assert not words


@pytest.mark.parametrize("encode", [str.encode, lambda text: text.encode("utf-8-sig")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_of_every_system_are_read(encode, line_end, tmp_path):
    (tmp_path / "lora.toml").write_bytes(encode(f"{RIGHT}seed = 3\n".replace("\n", line_end)))
    assert read_options(TrainNetworkOptions, ["--config_file", str(tmp_path / "lora.toml")]).seed == 3


@pytest.mark.parametrize("name", [" ", "..", "v1.", "v1 ", "猫 one", "a.b", "connie", "x" * 180])
def test_unusual_names_stay_in_the_folder(name, tmp_path):
    assert SavingOptions(output_dir=str(tmp_path), output_name=name).check() == []
    path = (tmp_path / f"{name}.safetensors").resolve()
    path.touch()
    assert path.parent == tmp_path.resolve()
    assert LoggingOptions(log_prefix="a/b-", logging_dir="logs").check() == []


BAD_METADATA = {
    "depth": '{"a.png": ' + "[" * 5000,
    "many digits": '{"a.png": {"image_size": [' + "9" * 5000 + ", 1]}}",
    "half a character": r'{"a.png": {"caption": "\ud83d"}}',
    "NUL in a name": r'{"a\u0000.png": {"caption": "x"}}',
    "a way out": '{"../../../../etc/passwd": {"caption": "x"}}',
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_a_hostile_metadata_file_is_a_sentence(what, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "a.png")
    (tmp_path / "meta.json").write_text(BAD_METADATA[what], encoding="utf-8")
    subset = SubsetOptions(image_dir=tmp_path / "data", metadata_file=tmp_path / "meta.json")
    assert "meta.json" in refusal(scan, [subset])


@pytest.mark.parametrize(
    "line",
    ["a --w 99999999", "a --d " + "9" * 5000, "a --s " + "9" * 5000, "a --l " + "9" * 400],
)
def test_a_prompt_with_huge_numbers_is_a_sentence(line):
    assert "--sample_prompts" in refusal(prompts_of, line)


@posix
def test_names_with_line_ends_do_not_break_lines_of_messages(tmp_path):
    folder = tmp_path / "10_a"
    folder.mkdir()
    (folder / "x\nerror: you\x1b[2J\x07.png").write_bytes(b"broken")
    script = Path(__file__).parents[1] / "train_network.py"
    words = ["--train_data_dir", tmp_path, "--output_dir", tmp_path / "out", "--resolution", "64"]
    words += ["--pretrained_model_name_or_path", tmp_path / "none.safetensors"]
    result = subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, encoding="utf-8"
    )  # fmt: skip
    assert result.returncode == 2
    assert r"x\nerror: you\x1b[2J\x07.png" in result.stderr
    assert all(ord(character) >= 32 for line in result.stderr.splitlines() for character in line)
