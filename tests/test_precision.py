"""Number formats, and what --full_fp16 needs of the gradient scaler."""

import pytest
import torch

from library.options.groups import TrainNetworkOptions
from library.training.precision import allow_fp16_gradients, full_dtype, weight_dtype


def test_the_network_is_fp32_unless_told_otherwise():
    options = TrainNetworkOptions(mixed_precision="bf16")
    assert (weight_dtype(options), full_dtype(options)) == (torch.bfloat16, torch.float32)
    options = TrainNetworkOptions(mixed_precision="bf16", full_bf16=True)
    assert full_dtype(options) == torch.bfloat16


def test_fp16_gradients_are_unscaled_after_being_allowed():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.float().sum()).backward()
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
    allow_fp16_gradients(scaler)
    scaler.unscale_(optimizer)
    assert torch.equal(parameter.grad, torch.ones(4, dtype=torch.float16))
