"""Drawing all that gen_img.py was asked for, and writing it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from library.errors import OutOfMemory, UserError
from library.generating.drawing import Artist, Drawn, batches_of, highres_of
from library.generating.models import attached, has_text, load_family, merge, network_of, prepare
from library.generating.options import DrawOptions
from library.generating.outputs import OutputNames, picture_text, write_with_text
from library.generating.preparation import Prepared
from library.generating.requests import PictureRequest, PromptLine
from library.options.groups import PrecisionOptions
from library.training.memory_errors import is_out_of_memory
from library.training.precision import choose_attention

logger = logging.getLogger(__name__)


class Session:
    """A model with its networks, and the files that it fills."""

    def __init__(self, options: DrawOptions, prepared: Prepared):
        self.options, self.prepared = options, prepared
        dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
        self.family = load_family(prepared.family, prepared.model, dtype)
        count = len(prepared.networks) if options.network_merge else options.network_merge_n_models or 0
        for file in prepared.networks[:count]:
            merge(self.family, file)
        self.files = prepared.networks[count:]
        self.num_merged = count
        self.networks = [network_of(self.family, file) for file in self.files]
        prepare(self.family, any(map(has_text, self.networks)), self._change_unet)
        self.artist = Artist(self.family, options.sampler, highres_of(options))
        self.names = OutputNames(options, is_highres=bool(options.highres_fix_scale))
        self.num_drawn = 0
        self._multipliers: list[float] | None = None  # of what was drawn last

    def _change_unet(self, unet: nn.Module) -> None:
        wanted = self.options.xformers or self.options.diffusers_xformers
        choose_attention(unet, PrecisionOptions(xformers=wanted), self.family.device)
        if self.options.opt_channels_last:
            unet.to(memory_format=torch.channels_last)

    def draw(self, pictures: list[PictureRequest]) -> None:
        """Draw and write pictures, batch by batch."""
        with tqdm(total=len(pictures), unit="picture", disable=len(pictures) < 2) as bar:
            for batch in batches_of(self.prepared.with_beginnings(pictures), self.options.batch_size):
                with self._networks_of(batch[0]), enough_memory():
                    drawn = self.artist.draw(batch)
                for index, one in enumerate(drawn):
                    self._write(one, self.num_drawn + 1 + index % len(batch))
                self.num_drawn += len(batch)
                bar.update(len(batch))

    def _write(self, drawn: Drawn, number: int) -> None:
        if drawn.is_first_stage and not self.options.highres_fix_save_1st:
            return
        path = self.names.of(drawn.request, number, drawn.is_first_stage)
        sampler = drawn.request.sample_sampler or self.options.sampler
        write_with_text(path, drawn.picture, picture_text(drawn.request, sampler, self.prepared.row.takes_sizes))
        logger.info("drawn: %s", path)

    def ask(self) -> None:
        """Draw what is typed, until an empty line or the end of the input."""
        while True:
            try:
                text = input("prompt (empty to end): ").strip()
            except EOFError:
                return
            if not text:
                return
            try:
                self.draw(self.prepared.requests.of_line(PromptLine(text, "the prompt")))
            except UserError as error:
                for problem in error.problems:
                    logger.warning(problem)

    @contextmanager
    def _networks_of(self, request: PictureRequest) -> Iterator[None]:
        """A block in which the networks are on the model, as strong as the request wants them."""
        multipliers = [file.multiplier for file in self.files]
        given = (request.network_mul or ())[self.num_merged :]
        multipliers[: len(given)] = given
        if self._multipliers != multipliers and any(map(has_text, self.networks)):
            self.artist.forget_text()
        self._multipliers = multipliers
        with attached(self.networks, multipliers):
            yield


@contextmanager
def enough_memory() -> Iterator[None]:
    """A block of drawing; where it needs too much memory, the error says what needs less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "drawing needs more memory than there is; a smaller size or batch, --bf16 or --fp16 need less"
        ) from error


def draw_pictures(options: DrawOptions, prepared: Prepared) -> None:
    """Draw all that was asked for, or what is typed."""
    session = Session(options, prepared)
    with logging_redirect_tqdm():
        if options.interactive:
            session.ask()
        else:
            session.draw(prepared.pictures)
