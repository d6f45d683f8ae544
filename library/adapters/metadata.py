"""Writing other metadata into a safetensors file: its tensors are copied as they are. Needs no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from library.files import written_whole
from library.safetensors_header import SafetensorsHeader, read_header
from library.texts import read_json

BLOCK_BYTES = 1 << 20
WINDOW = 0x100000, 0x110000  # of a file: what kohya's short hash is of

# What a file keeps that is told no more than programs need to load it and to list it.
KEPT = (
    "ss_v2",
    "ss_base_model_version",
    "ss_output_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "sshs_",
    "ssmd_",
    "modelspec.",
)
CAPTIONS = ("ss_tag_frequency",)
CAPTIONS_OF_SUBSETS = ("caption_prefix", "caption_suffix", "class_tokens")
DATASET = (
    *CAPTIONS,
    "ss_datasets",
    "ss_dataset_dirs",
    "ss_reg_dataset_dirs",
    "ss_bucket_info",
    "ss_num_train_images",
    "ss_num_validation_images",
    "ss_num_reg_images",
    "ss_training_comment",
)
LEVELS = ("captions", "dataset", "training", "all")  # each with what those before it strip


def stripped(metadata: Mapping[str, str], level: str) -> dict[str, str]:
    """Metadata without what a level of LEVELS names.

    `captions` are texts and tags of captions, `dataset` all that tells of the pictures and their folders, `training`
    all but what programs need, `all` everything.
    """
    if level == "all":
        return {}
    if level == "training":
        return {name: value for name, value in metadata.items() if name.startswith(KEPT)}
    gone = CAPTIONS if level == "captions" else DATASET
    left = {name: value for name, value in metadata.items() if name not in gone}
    if "ss_datasets" in left:
        left["ss_datasets"] = _without_captions(left["ss_datasets"])
    return left


def _without_captions(datasets: str) -> str:
    """The list of a run's datasets without tags and the texts that captions have; nothing where it is no such list."""
    try:
        found = read_json(datasets)
        for dataset in found:
            dataset.pop("tag_frequency", None)
            for subset in dataset.get("subsets", []):
                for name in CAPTIONS_OF_SUBSETS:
                    subset.pop(name, None)
    except (json.JSONDecodeError, AttributeError, TypeError):
        return "[]"
    return json.dumps(found)


def write_with_metadata(source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Write the tensors of a safetensors file with this metadata; both may be the same file.

    Files of networks have the hashes that they ought to have.
    """
    header = read_header(source, str(source))
    metadata = dict(metadata)
    if any(name.startswith(("ss_", "sshs_")) for name in metadata):
        metadata |= hashes(source, header, metadata)
    start = _header_bytes(header, metadata)
    size = len(start) + _data_size(header)
    with written_whole(target, num_bytes=size) as temporary, open(temporary, "wb") as file:
        file.write(start)
        for block in _data(source, header):
            file.write(block)


def hashes(source: Path, header: SafetensorsHeader, metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a file with this metadata, as `network_files.content_hashes`."""
    start = _header_bytes(header, {name: value for name, value in metadata.items() if name.startswith("ss_")})
    whole, window = hashlib.sha256(), hashlib.sha256(start[slice(*WINDOW)])
    position = len(start)
    for block in _data(source, header):
        whole.update(block)
        first, last = (min(max(end - position, 0), len(block)) for end in WINDOW)
        window.update(block[first:last])
        position += len(block)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def _header_bytes(header: SafetensorsHeader, metadata: Mapping[str, str]) -> bytes:
    """A header as the safetensors library writes it, with the length before it and spaces behind it."""
    tensors = {
        name: {"dtype": header.dtypes[name], "shape": header.shapes[name], "data_offsets": header.offsets[name]}
        for name in header.shapes
    }
    text = json.dumps({"__metadata__": dict(metadata)} | tensors, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data_size(header: SafetensorsHeader) -> int:
    return max((end for _, end in header.offsets.values()), default=0)


def _data(source: Path, header: SafetensorsHeader) -> Iterator[bytes]:
    """The tensors of a file, in blocks."""
    left = _data_size(header)
    with open(source, "rb") as file:
        file.seek(header.size)
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            left -= len(block)
            yield block
