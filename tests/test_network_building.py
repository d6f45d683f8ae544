"""Which network a run has: made anew, from a file, and on a base model into which other networks were merged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import ModelFamily
from library.network_files import read_weights, write_weights
from library.options.groups import TrainNetworkOptions
from library.recipes.network_building import build_network, merge_base_weights
from networks import dora, loha, lokr, lora
from tests import tiny

CONVOLUTIONS = {"conv_dim": "2", "conv_alpha": "3"}


@pytest.fixture
def family_with(model_file):
    """A family with these options, on models of its own."""

    def make(**options: object) -> tuple[ModelFamily, TrainNetworkOptions]:
        read = TrainNetworkOptions(pretrained_model_name_or_path=str(model_file), **options)
        return tiny.load_family(read), read

    return make


def write_trained(path: Path, family: ModelFamily, seed: int, **arguments: str) -> nn.Module:
    """A file of a network as after training, which is left on the model."""
    network = build_network(lora, family, TrainNetworkOptions(network_dim=3, network_alpha=2), arguments).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    network.save_weights(path, None, None)
    return network


@torch.no_grad()
def answer(family: ModelFamily) -> Tensor:
    """What U-Net and text encoders say of a fixed input."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return family.predict(latents, torch.tensor([500, 500]), family.prompt_conds("a cat", ""))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_merged_base_weights_act_as_the_attached_network(suffix, family_with, tmp_path):
    path = tmp_path / f"first{suffix}"
    family, _ = family_with()
    network = write_trained(path, family, 1, **CONVOLUTIONS)
    network.set_multiplier(0.5)
    attached = answer(family)
    family, options = family_with(base_weights=[str(path)], base_weights_multiplier=[0.5])
    plain = answer(family)
    merge_base_weights(lora, family, options)
    torch.testing.assert_close(answer(family), attached, rtol=1e-4, atol=1e-5)
    assert (attached - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("module", [dora, loha, lokr])
def test_a_merged_network_acts_as_the_attached_one(module, family_with):
    """Loaders of diffusers refuse LoHa and LoKr; its classes run what was merged."""
    family, options = family_with(network_dim=3, network_alpha=2)
    network = build_network(module, family, options, CONVOLUTIONS).eval()
    plain = answer(family)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    attached = answer(family)
    network.remove()
    family.keep_weights()
    network.merge()
    torch.testing.assert_close(answer(family), attached, rtol=1e-4, atol=1e-4)
    assert (attached - plain).norm() > 0.01 * plain.norm()


def test_of_several_base_weights_each_has_its_multiplier_and_the_rest_1(family_with, tmp_path):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, path in enumerate(paths):
        write_trained(path, family_with()[0], seed)
    family, options = family_with(base_weights=[str(path) for path in paths], base_weights_multiplier=[0.25])
    layer = family.unet.mid_block.attentions[0].proj_in
    before = layer.weight.clone()
    merge_base_weights(lora, family, options)
    deltas = []
    for path in paths:
        fresh, _ = family_with()
        targets = list(fresh.adapter_targets(conv=False))
        network = lora.create_network_from_weights(targets, path)
        (name,) = (target.name for target in targets if target.layer is fresh.unet.mid_block.attentions[0].proj_in)
        deltas.append(getattr(network, name).delta_weight())
    torch.testing.assert_close(layer.weight - before, (0.25 * deltas[0] + deltas[1]).detach(), rtol=1e-4, atol=1e-6)


def test_base_weights_with_keys_that_the_model_has_not_are_refused(family_with, tmp_path):
    path = tmp_path / "other.safetensors"
    write_trained(path, family_with()[0], 1)
    write_weights(path, read_weights(path) | {"lora_unet_layer.hada_w1_a": torch.ones(2, 2)}, None, None)
    family, options = family_with(base_weights=[str(path)])
    with pytest.raises(UserError, match="^--base_weights: .* has 1 weights .* lora_unet_layer.hada_w1_a"):
        merge_base_weights(lora, family, options)


@pytest.mark.parametrize("content", [b"", b"not a network", torch.ones(1)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_no_network_is_named(content, suffix, family_with, tmp_path):
    path = tmp_path / f"broken{suffix}"
    torch.save([content], path) if isinstance(content, Tensor) else path.write_bytes(content)
    family, options = family_with(base_weights=[str(path)])
    with pytest.raises(UserError, match="^--base_weights: .*broken.* is .*no network file"):
        merge_base_weights(lora, family, options)


def test_network_weights_that_do_not_fit_are_told_with_their_flag(family_with, tmp_path):
    path = tmp_path / "first.safetensors"
    write_trained(path, family_with()[0], 1, **CONVOLUTIONS)
    family, options = family_with(network_weights=str(path), network_dim=3)
    with pytest.raises(UserError, match="^--network_weights: .*first.safetensors has .* weights"):
        build_network(lora, family, options, {})


def test_base_weights_with_convolutions_do_not_change_which_layers_are_trained(family_with, tmp_path):
    path = tmp_path / "conv.safetensors"
    write_trained(path, family_with()[0], 1, **CONVOLUTIONS)
    plain = build_network(lora, *family_with(), {})
    family, options = family_with(base_weights=[str(path)])
    merge_base_weights(lora, family, options)
    assert build_network(lora, family, options, {}).state_dict().keys() == plain.state_dict().keys()


def test_the_network_of_a_file_has_its_layers_ranks_and_answers(family_with, tmp_path):
    path = tmp_path / "first.safetensors"
    family, _ = family_with()
    network = write_trained(path, family, 1, **CONVOLUTIONS, mid_lr_weight="0,0,0")
    trained = answer(family)
    family, options = family_with(network_weights=str(path), dim_from_weights=True, network_dim=64)
    again = build_network(lora, family, options, {"rank_dropout": "0.5"}).eval()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert not [name for name in again.state_dict() if "mid_block" in name or "middle_block" in name]
    assert all(adapter.rank_dropout == 0.5 for adapter in again.adapters())
    torch.testing.assert_close(answer(family), trained)


def test_a_network_without_layers_is_refused(family_with):
    zeros = {"down_lr_weight": "zeros", "mid_lr_weight": "0,0,0", "up_lr_weight": "zeros"}
    with pytest.raises(UserError, match="no layers"):
        build_network(lora, *family_with(network_train_unet_only=True), zeros)
