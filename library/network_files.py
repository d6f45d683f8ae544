"""Adapter files: read, write, and the hashes in their metadata."""

import hashlib
import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from library.errors import UserError, first_line
from library.files import write_bytes_whole


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .ckpt network file; pickles are loaded weights-only."""
    is_pickle = path.suffix.lower() != ".safetensors"
    try:
        weights = torch.load(path, "cpu", weights_only=True) if is_pickle else safetensors.torch.load_file(path)
    except Exception as error:  # damaged pickles fail in many ways
        reason = "" if is_pickle else f": {first_line(error)}"  # torch's own would advise to switch safety off
        raise UserError(f"{path} is damaged or no network file, or holds more than weights{reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} is no network file: it holds more than weights")
    return weights


def write_weights(
    path: Path, weights: dict[str, Tensor], dtype: torch.dtype | None, metadata: dict[str, str] | None
) -> None:
    """Write weights whole, cast to `dtype` where given; metadata goes into safetensors files only."""
    weights = {
        name: value.detach().to("cpu", dtype_in_file(name, dtype)).contiguous() for name, value in weights.items()
    }
    if path.suffix.lower() == ".safetensors":
        metadata = (metadata or {}) | content_hashes(weights, metadata or {})
        data = safetensors.torch.save(weights, {name: str(value) for name, value in metadata.items()})
        write_bytes_whole(path, data)
    else:
        file = io.BytesIO()
        torch.save(weights, file)
        write_bytes_whole(path, file.getbuffer())


def dtype_in_file(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype` for all weights but DoRA's norms: their changes are smaller than what 16 bits of the norms tell apart."""
    return None if name.endswith(".dora_scale") else dtype


def content_hashes(weights: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """`sshs_model_hash` (sha256 of the tensor data) and `sshs_legacy_hash` (of a window of the file) as kohya has them.

    Both are of the file as it would be with the ss_ metadata alone.
    """
    data = safetensors.torch.save(weights, {k: str(v) for k, v in metadata.items() if k.startswith("ss_")})
    header_size = int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[8 + header_size :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
