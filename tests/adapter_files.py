"""Adapter files of each algorithm for a few layers of the toy models, as LyCORIS writes them."""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor

from library.families.base import AdapterTarget
from library.families.checkpoints import Models
from library.families.sd import sd_adapter_targets
from library.families.sdxl import sdxl_adapter_targets
from tests.test_adapters import of_lycoris

METADATA = {
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}
ENDS = (  # of the names of the U-Net's layers that are adapted: every sort of them
    *("proj_in", "attn1_to_q", "attn2_to_k", "attn2_to_out_0"),
    *("ff_net_0_proj", "resnets_0_conv1", "resnets_0_conv_shortcut", "in_layers_2", "skip_connection", "emb_layers_1"),
    *("time_emb_proj", "downsamplers_0_conv", "upsamplers_0_conv"),
)  # fmt: skip


def targets(models: Models, kind: str) -> Iterator[AdapterTarget]:
    if kind == "sdxl":
        found = sdxl_adapter_targets(models.text_encoders, models.unet, conv=True)
    else:
        found = sd_adapter_targets(models.text_encoders[0], models.unet, conv=True)
    return (target for target in found if target.part != "unet" or target.name.endswith(ENDS))


def weights_of(
    models: Models, kind: str, algorithm: str, wanted: Callable[[AdapterTarget], bool] = lambda target: True
) -> dict[str, Tensor]:
    """What a file of this algorithm (of `test_adapters.MODULES`) holds, after training as it were."""
    torch.manual_seed(0)
    found = {}
    for target in filter(wanted, targets(models, kind)):
        module = of_lycoris(algorithm, deepcopy(target.layer))
        tensors = module.state_dict().items()
        found |= {f"{target.name}.{name}": value.detach().clone().contiguous() for name, value in tensors}
    return found
