"""Captioning models of transformers, from a local folder."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from library.errors import UserError, first_line

# type of model -> what it is asked when the user asks nothing; the others caption a picture without a question
TASKS = {"florence2": "<DETAILED_CAPTION>"}
QUESTION = "Describe the picture in one sentence."  # for models that chat
WITHOUT_PROMPT = ("git", "vision-encoder-decoder")


@dataclass(frozen=True)
class Wording:
    """How captions are generated."""

    prompt: str | None = None
    num_beams: int = 1
    top_p: float | None = None  # tokens are drawn from those that make up this probability; None takes the likeliest
    max_tokens: int = 75
    min_tokens: int = 0
    seed: int = 42


class Captioner:
    """A model and its processor; a UserError, which begins with `label`, where the folder holds none."""

    def __init__(self, folder: Path, wording: Wording, label: str):
        self.wording = wording
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32
        if self.device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        disable_progress_bar()
        try:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
            self.processor, self.tokenizer = _processor(folder)
        except Exception as error:  # of many kinds, for files that are missing, damaged or of no such model
            raise UserError(f"{label}: {folder} is no captioning model: {first_line(error)}") from error
        self.model.to(self.device).eval()
        self.kind: str = self.model.config.model_type
        if wording.prompt and self.kind in WITHOUT_PROMPT:
            raise UserError(f"--prompt: a model of the type {self.kind} takes none")
        self.tokenizer.padding_side = "left"  # generation goes on at the right

    @torch.no_grad()
    def captions(self, images: list[Image.Image], names: list[str]) -> list[str]:
        """The captions of RGB pictures; what is drawn depends on seed and names, not on pictures captioned before."""
        inputs = self._inputs(images).to(self.device, self.model.dtype)
        torch.manual_seed(self.wording.seed + zlib.crc32("\0".join(names).encode()))
        ids = self.model.generate(**inputs, **self._arguments())
        texts = self.tokenizer.batch_decode(self._answers(ids, inputs), skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _arguments(self) -> dict[str, Any]:
        wording = self.wording
        lengths = dict(max_new_tokens=wording.max_tokens, min_new_tokens=wording.min_tokens)
        if wording.top_p is not None:
            return dict(lengths, do_sample=True, top_p=wording.top_p)
        return dict(lengths, do_sample=False, num_beams=wording.num_beams)

    def _inputs(self, images: list[Image.Image]) -> Any:
        prompt = self.wording.prompt or TASKS.get(self.kind)
        if getattr(self.processor, "chat_template", None):
            question = {"type": "text", "text": prompt or QUESTION}
            talks = [[{"role": "user", "content": [{"type": "image", "image": i}, question]}] for i in images]
            shape = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
            return self.processor.apply_chat_template(talks, **shape, return_tensors="pt", padding=True)
        if prompt:
            return self.processor(images=images, text=[prompt] * len(images), return_tensors="pt", padding=True)
        return self.processor(images=images, return_tensors="pt")

    def _answers(self, ids: Tensor, inputs: Any) -> Tensor:
        """What was generated [B, L], without the question where the model repeats it."""
        asked = inputs.get("input_ids")
        if asked is not None and ids.shape[1] >= asked.shape[1] and bool((ids[:, : asked.shape[1]] == asked).all()):
            return ids[:, asked.shape[1] :]
        return ids


def _processor(folder: Path) -> tuple[Callable, Any]:
    """What makes a model's inputs of pictures and texts, and its tokenizer, which some models come with apart."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if hasattr(processor, "image_processor"):
        return processor, processor.tokenizer
    images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return images, AutoTokenizer.from_pretrained(folder, local_files_only=True)
