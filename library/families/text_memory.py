"""What a frozen text encoder makes of captions, computed once."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.families.base import Conds
from library.families.parts import Part

MAX_CAPTIONS = 512  # kept where captions change from draw to draw, so that not all can be
MAX_DEVICE_BYTES = 128 * 2**20
MAX_HOST_BYTES = 2 * 2**30


class TextMemory:
    """Conditioning of captions: of those used last, or, once they have been told, of all there are.

    A caption is always encoded alone, so that its conditioning is the same to the bit in both cases and in every batch.
    It is kept in the dtype of the weights, to which the layers that it goes into would cast it anyway.
    """

    def __init__(
        self,
        encode: Callable[[str], Conds],
        encoders: Sequence[Part],
        device: torch.device,
        dtype: torch.dtype,
    ):
        """`encode` gives a caption's conditioning, without the batch dimension, by means of the encoders."""
        self.encode, self.encoders, self.device, self.dtype = encode, encoders, device, dtype
        self.is_complete = False
        self._known: OrderedDict[str, Conds] = OrderedDict()

    def conds(self, captions: Sequence[str]) -> Conds:
        """The conditioning of a batch of captions, on the device."""
        all_conds = [self._remembered(caption) for caption in captions]
        return {
            name: torch.stack([conds[name].to(self.device, non_blocking=True) for conds in all_conds])
            for name in all_conds[0]
        }

    def fill(self, captions: Sequence[str], progress: Callable[[], object]) -> bool:
        """Encode all captions there will be; False where they need too much memory, and nothing is changed then.

        A few stay on the device, more in the computer's memory, from which they are copied batch by batch. The encoders
        leave the device. There are no captions to encode where batches bring their conditioning.
        """
        examples = [value for caption in captions[:1] for value in self.encoded(caption).values()]
        num_bytes = len(captions) * sum(value.nbytes for value in examples)
        if num_bytes > MAX_HOST_BYTES:
            return False
        stays = num_bytes <= MAX_DEVICE_BYTES
        for caption in captions:
            conds = self.encoded(caption)
            self._known[caption] = conds if stays else {name: _on_host(value) for name, value in conds.items()}
            progress()
        self.is_complete = True
        self._release()
        return True

    @contextmanager
    def encoders_at_work(self) -> Iterator[None]:
        """A block that uses the encoders; they leave the device after it where training asks no more of them."""
        yield
        if self.is_complete:
            self._release()

    def _release(self) -> None:
        for encoder in self.encoders:
            encoder.release()

    def _remembered(self, caption: str) -> Conds:
        if caption in self._known:
            self._known.move_to_end(caption)
            return self._known[caption]
        conds = self.encoded(caption)
        if not self.is_complete:
            self._known[caption] = conds
            if len(self._known) > MAX_CAPTIONS:
                self._known.popitem(last=False)
        return conds

    @torch.no_grad()
    def encoded(self, caption: str) -> Conds:
        """A caption's conditioning as it is kept, without the batch dimension."""
        return {name: value.to(self.dtype) for name, value in self.encode(caption).items()}


def _on_host(value: Tensor) -> Tensor:
    """In memory that a GPU copies from without waiting."""
    return value.cpu().pin_memory() if value.is_cuda else value
