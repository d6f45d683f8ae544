"""What it costs to hold a U-Net in fewer bits: the error of its output, with and without a network, and its loss.

Noise, timesteps and conditioning are the same for all forms; those of the text come from encoders in fp32.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image, ImageOps
from torch import Tensor, nn

from library.dataset.images import load_image, to_model_input
from library.families.base import Batch, ModelFamily
from library.options.derived import DEFAULT_NETWORK
from library.options.groups import TrainNetworkOptions
from library.recipes.network import load_family
from library.recipes.network_building import load_algorithm
from library.training.denoising import Ddpm, Question, question_of
from library.training.on_cpu import prepare_for_cpu
from library.training.validation import validation_timesteps

FORMS = {  # as tables name them -> the flags that hold a U-Net so
    "fp32": {},
    "bf16": {"mixed_precision": "bf16"},
    "int8": {"mixed_precision": "bf16", "base_quantization": "int8"},
    "fp8": {"mixed_precision": "bf16", "fp8_base_unet": True},
    "nf4": {"mixed_precision": "bf16", "base_quantization": "nf4"},
}
RANK = 8
SHARE = 0.1  # of a weight's norm, that of the random network's change of it
HEAD = (
    "| | U-Net, MB | output, against fp32 | against bf16 | with a network, against fp32 | against bf16 | loss |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Answers:
    """What one form of a U-Net says to all questions, in fp32."""

    num_bytes: int
    plain: Tensor  # [N, C, h, w]
    with_network: Tensor  # [N, C, h, w]
    loss: float  # mean squared error of `plain`


def compare_forms(
    checkpoint: str, name: str, pictures: Sequence[Path], captions: Sequence[str], size: int
) -> Iterator[str]:
    """The lines of a table, each when it is known; one form of the model, of the family so named, is in memory."""
    yield from HEAD
    questions: list[Question] = []
    answers: dict[str, Answers] = {}
    weights: dict[str, Tensor] = {}  # of the network
    for form, flags in FORMS.items():
        options = TrainNetworkOptions(pretrained_model_name_or_path=checkpoint, **flags)
        family = load_family(options, name, PartialState().device)
        questions = questions or questions_of(family, options, pictures, captions, size)
        weights = weights or random_weights(family)
        answers[form] = answers_of(family, options, questions, weights)
        del family
        gc.collect()  # its parts know each other
        yield row(form, answers)


@torch.no_grad()
def questions_of(
    family: ModelFamily, options: TrainNetworkOptions, pictures: Sequence[Path], captions: Sequence[str], size: int
) -> list[Question]:
    """Each picture, cut to a square of `size` pixels, at all timesteps of the validation."""
    family.remember_text(captions, lambda: None)
    timesteps = torch.tensor(validation_timesteps(options), device=family.device)
    objective = Ddpm(options, family.v_prediction, family.device)
    sizes, weights = torch.full((len(timesteps), 2), size), torch.ones(len(timesteps), device=family.device)
    torch.manual_seed(0)
    questions = []
    for path, caption in zip(pictures, captions, strict=True):
        picture = ImageOps.fit(Image.fromarray(load_image(path)), (size, size))
        latents = family.vae.encode(torch.from_numpy(to_model_input(np.asarray(picture)))[None])
        batch = Batch(
            captions=[caption] * len(timesteps),
            loss_weights=weights,
            images=None,
            latents=latents.repeat(len(timesteps), 1, 1, 1),
            conds=None,
            alpha_masks=None,
            original_sizes_hw=sizes,
            crop_top_lefts=torch.zeros_like(sizes),
            target_sizes_hw=sizes,
        )
        questions.append(question_of(family, objective, batch, timesteps))
    family.vae.release()
    return questions


def lora_on(family: ModelFamily) -> nn.Module:
    """A LoRA on the layers of the U-Net that are trained without further arguments."""
    targets = [target for target in family.adapter_targets(conv=False) if target.part == "unet"]
    return load_algorithm(DEFAULT_NETWORK).create_network(targets, RANK, RANK).to(family.device).eval()


@torch.no_grad()
def random_weights(family: ModelFamily) -> dict[str, Tensor]:
    """The weights of such a LoRA that changes each weight by the same share of its norm."""
    family.keep_weights()
    network = lora_on(family)
    for adapter in network.adapters():
        nn.init.normal_(adapter.lora_up.weight)
    wanted = torch.stack([adapter.base.weight.norm() for adapter in network.adapters()]) * SHARE
    network.rescale(wanted / network.norms())
    return network.state_dict()


def answers_of(
    family: ModelFamily, options: TrainNetworkOptions, questions: Sequence[Question], weights: dict[str, Tensor]
) -> Answers:
    """All that is asked, without and with the network of these weights; layers compute as in training."""
    num_bytes = sum(value.nbytes for value in family.unet.parameters())
    network = lora_on(family)
    network.load_state_dict(weights)
    network.apply_to()
    prepare_for_cpu(family, network, options)
    predictions = []
    for multiplier in (0.0, 1.0):
        network.set_multiplier(multiplier)
        with torch.no_grad():
            answers = [family.predict(each.noisy, each.timesteps, each.conds).float() for each in questions]
        predictions.append(torch.cat(answers))
    loss = F.mse_loss(predictions[0], torch.cat([each.target for each in questions])).item()
    return Answers(num_bytes, *predictions, loss)


def row(form: str, answers: dict[str, Answers]) -> str:
    """The last form's line."""
    own = answers[form]
    cells = [f"{own.num_bytes / 1e6:.1f}"]
    for which in ("plain", "with_network"):
        for other in ("fp32", "bf16"):
            wanted = getattr(answers.get(other, own), which)
            error = ((getattr(own, which) - wanted).norm() / wanted.norm()).item()
            cells.append("-" if other not in answers or other == form else f"{error:.2%}")
    return f"| {form} | {' | '.join(cells)} | {own.loss:.4f} |"
