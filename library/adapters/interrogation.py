"""Which words a network changes most: all tokens through the text encoders, without it and with it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from library.adapters.file import open_adapter
from library.adapters.spellings import kohya_names
from library.errors import UserError
from library.families import clip, family_class, family_of_kind
from library.families.base import ModelFamily
from library.families.detect import inspect_checkpoint
from library.options.groups import ModelOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effect:
    """A token, and the mean absolute change of the hidden states at it and at the end of the text behind it."""

    token: int
    text: str
    change: float


@torch.no_grad()
def effects_of_tokens(options: ModelOptions, network: Path, batch_size: int) -> list[Effect]:
    """The effect on each token, largest first; UserError where the network has no layers of the text encoders."""
    checkpoint = inspect_checkpoint(options.pretrained_model_name_or_path, "--sd_model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = family_class(family_of_kind(checkpoint))(options, device, torch.float32)
    if options.clip_skip and len(family.text_encoders) > 1:
        logger.warning("--clip_skip has no effect: SDXL takes the last layer but one")
    changes = _changes(family, network, checkpoint.kind)
    tokenizer = clip.build_tokenizer()
    special = set(tokenizer.all_special_ids)
    tokens = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    ends = torch.tensor([tokenizer.bos_token_id]), torch.tensor([tokenizer.eos_token_id])
    ids = torch.stack([ends[0].expand(len(tokens)), tokens, ends[1].expand(len(tokens))], dim=1)  # [tokens, 3]
    before = list(_hidden_states(family, ids, batch_size, "without the network"))
    for parameter, change in changes:
        parameter.add_(change.to(parameter))
    effects = []
    after = _hidden_states(family, ids, batch_size, "with it")
    for states, changed in zip(before, after, strict=True):
        effects += (changed - states).abs().mean(dim=(1, 2)).tolist()
    texts = tokenizer.batch_decode(tokens[:, None])
    found = [Effect(*row) for row in zip(tokens.tolist(), texts, effects, strict=True)]
    return sorted(found, key=lambda effect: -effect.change)


def _changes(family: ModelFamily, network: Path, kind: str) -> list[tuple[Tensor, Tensor]]:
    """The parameters of the text encoders that the network changes, and by how much each."""
    file, names = open_adapter(network, "--model"), kohya_names(kind)
    layers = {names.get(name, name): layer for name, layer in file.layers.items()}
    assert family.text_encoders  # which reads their weights
    found = []
    for target in family.adapter_targets(conv=False):
        layer = layers.get(target.name)
        if layer is None or target.part == "unet":
            continue
        found.append((target.layer.weight, layer.delta(target.layer.weight.cpu())))
        if (bias := layer.bias_delta()) is not None:
            found.append((target.layer.bias, bias))
    if not found:
        raise UserError(f"--model: {network} changes nothing in the text encoder of --sd_model")
    return found


def _hidden_states(family: ModelFamily, ids: Tensor, batch_size: int, label: str) -> Iterator[Tensor]:
    """Batches [B, 2, D] of the states behind a token and behind the end; what follows would not change them."""
    for batch in tqdm(ids.split(batch_size), desc=label, unit="batches"):
        chunks = batch[:, None].to(family.device)  # [B, 1, 3]
        yield _encoded(family, chunks)[:, 1:].cpu()


def _encoded(family: ModelFamily, chunks: Tensor) -> Tensor:
    """Hidden states of a model with one text encoder, or of several side by side, as SDXL's U-Net reads them."""
    if len(family.text_encoders) == 1:
        return clip.encode(family.text_encoders[0], chunks, family.options.clip_skip)
    return torch.cat([clip.encode_penultimate(encoder, chunks)[0] for encoder in family.text_encoders], dim=-1)
