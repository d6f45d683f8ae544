"""A safetensors file written tensor by tensor, so that it may be larger than memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.families.checkpoint_files import SafetensorsReader
from library.files import written_whole

NAMES = {dtype: name for name, dtype in SafetensorsReader.DTYPES.items()}


def write_streamed(
    path: Path,
    planned: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tensor for each planned name, as `tensor_of` gives it; the file appears when it is whole.

    The order is that of safetensors itself: wide number formats first, so that all are aligned.
    """
    names = sorted(planned, key=lambda name: -planned[name][0].itemsize)
    header, start = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        dtype, shape = planned[name]
        end = start + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path, num_bytes=start) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            dtype, shape = planned[name]
            value = tensor_of(name).to(dtype)
            assert tuple(value.shape) == tuple(shape), name
            file.write(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
