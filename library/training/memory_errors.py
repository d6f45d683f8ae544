"""Too little memory, told in a sentence: what was being done, and what would need less."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.errors import OutOfMemory, counted
from library.families.base import Batch
from library.options.groups import TrainNetworkOptions
from library.training.memory_savers import CACHING, LOADING, MAIN_MEMORY, PREVIEWS, TRAINING, Saver, advice

# what is being done -> what would need less
SAVERS: dict[str, tuple[Saver, ...]] = {
    "loading the model": LOADING,
    "caching latents": CACHING,
    "encoding captions": LOADING,
    "drawing previews": PREVIEWS,
    "training": TRAINING,
}
# in messages of PyTorch's CPU allocator, OpenCV, the operating system and oneDNN; and of CUDA, cuBLAS and Apple's MPS
OF_MAIN_MEMORY = ("CPUAllocator", "Insufficient memory", "Cannot allocate memory", "could not create a primitive")
TEXTS = (*OF_MAIN_MEMORY, "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says, in whatever way, that there was no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in TEXTS)


@contextmanager
def memory_for(doing: str, options: TrainNetworkOptions) -> Iterator[None]:
    """Ends in OutOfMemory where there is too little memory for what is done inside, a key of SAVERS."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence(error, doing, options)) from error


@contextmanager
def memory_for_step(batch: Batch, step: int, options: TrainNetworkOptions) -> Iterator[None]:
    """The same for a training step, whose number and batch are named."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(sentence(error, "training", options, f"in step {step}, {described(batch)}")) from error


def described(batch: Batch) -> str:
    """Size and bucket of a batch: "4 pictures of 768x1024"."""
    height, width = batch.target_sizes_hw[0].tolist()
    return f"{counted(len(batch.captions), 'picture')} of {width}x{height}"


def sentence(error: Exception, doing: str, options: TrainNetworkOptions, when: str = "") -> str:
    """Whose memory ran out, when, how much was asked for, and what needs less."""
    is_main = isinstance(error, MemoryError) or any(text in str(error) for text in OF_MAIN_MEMORY)
    whose = "this computer" if is_main else "the GPU"
    left = advice(MAIN_MEMORY, options) if is_main else []
    if not is_main or not torch.cuda.is_available():
        left += advice(SAVERS[doing], options)
    what = f"what needs less, the cheapest first: {', '.join(left)}" if left else "all that saves memory is on already"
    return f"{whose} ran out of memory {when or f'while {doing}'}{amount(error)}; {what}"


def amount(error: Exception) -> str:
    """How much was asked for, where the error says it."""
    if match := re.search(r"[Tt]ried to allocate ([\d.]+ ?[KMGT]i?B)", str(error)):
        return f" (it asked for {match[1]})"
    if match := re.search(r"allocate (\d+) bytes", str(error)):
        return f" (it asked for {int(match[1]) / 2**30:.2f} GiB)"
    return ""
