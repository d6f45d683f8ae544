"""LoRA-FA, DyLoRA and OFT, and the ways in which LoRA may begin, compute what their papers say."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.network_files import read_weights
from networks import dylora, lora, lora_fa, oft
from networks.base import AdapterNetwork

LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), (2, 5, 16)),
    "linear without bias": (lambda: nn.Linear(16, 24, bias=False), (2, 5, 16)),
    "conv1x1": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 6, 6)),
}
layers = pytest.mark.parametrize("kind", LAYERS)
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


def on_layer(
    algorithm: ModuleType, kind: str, dim: int = 4, alpha: float = 2, **arguments: str
) -> tuple[nn.Module, AdapterNetwork, Tensor]:
    """A frozen layer, an attached network on it, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().requires_grad_(False)
    if algorithm is not oft and "conv" in kind:
        arguments = {"conv_dim": str(dim)} | ({} if algorithm is dylora else {"conv_alpha": str(alpha)}) | arguments
    network = algorithm.create_network([AdapterTarget(NAME, layer, "unet")], dim, alpha, **arguments)
    network.apply_to()
    return layer, network.train(), torch.randn(shape)


def disturb(network: nn.Module, by: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def with_weight(layer: nn.Module, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the layer gives for x with another weight."""
    bias = layer.bias if bias is None else bias
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def product(up: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)


def kept_numbers(layer: nn.Module, x: Tensor) -> int:
    """How many numbers a forward pass keeps for its backward pass."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.update({v.data_ptr(): v.numel()}) or v, lambda v: v):
        layer(x)
    return sum(kept.values())


# LoRA-FA


@layers
@pytest.mark.parametrize("is_flat", [False, True])
def test_lora_fa_has_the_gradients_of_lora_for_b_and_none_for_a(kind, is_flat):
    layer, network, x = on_layer(lora_fa, kind)
    disturb(network)
    (adapter,) = network.adapters()
    down, up = adapter.lora_down.weight.clone(), adapter.lora_up.weight.detach().clone().requires_grad_()
    if is_flat:
        network.flatten([{"params": list(network.parameters())}], torch.float32)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    expected = with_weight(layer, layer.weight + adapter.scale * product(up, down, layer), theirs)
    output = layer(ours)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for result in (output, expected):
        result.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    gradient = network.flat.spans[0].of(network.flat.gradients) if is_flat else adapter.lora_up.weight.grad
    torch.testing.assert_close(gradient, up.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in network.named_parameters()] == [f"{NAME}.lora_up.weight"]


@layers
def test_lora_fa_keeps_as_many_numbers_as_the_rank_and_not_the_input(kind):
    layer, _, x = on_layer(lora_fa, kind, dim=1)
    plain, _, _ = on_layer(lora, kind, dim=1)
    fewer = kept_numbers(plain, x) - kept_numbers(layer, x)
    places = layer(x).numel() // 24
    assert fewer == x.numel() - places  # A x, of one number a place, in the input's stead


def test_lora_fa_draws_a_with_kohyas_deviation():
    target = AdapterTarget(NAME, nn.Linear(400, 8), "unet")
    (adapter,) = lora_fa.create_network([target], 100, 1).adapters()
    assert adapter.lora_down.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)


# DyLoRA


@layers
@pytest.mark.parametrize("truncate", [False, True])
def test_dylora_trains_one_unit_of_neighbouring_ranks_at_a_time(kind, truncate):
    layer, network, x = on_layer(dylora, kind, 6, 3, unit="2", truncate=str(truncate))
    disturb(network)
    (adapter,) = network.adapters()
    down, up = (matrix.weight.detach().clone() for matrix in (adapter.lora_down, adapter.lora_up))
    chosen = set()
    for _ in range(20):
        network.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        learned = {number for number, part in enumerate(adapter.lora_down.parameters()) if part.grad is not None}
        assert learned == {n for n, part in enumerate(adapter.lora_up.parameters()) if part.grad is not None}
        (unit,) = learned
        own_down, own_up = (value.clone().requires_grad_() for value in (down, up))
        ranks = slice(0, 2 * unit + 2 if truncate else 6)
        weight = layer.weight + 3 / 6 * product(own_up[:, ranks], own_down[ranks], layer)
        expected = with_weight(layer, weight, x)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        rows = slice(2 * unit, 2 * unit + 2)
        for matrix, gradient in ((adapter.lora_down, own_down.grad[rows]), (adapter.lora_up, own_up.grad[:, rows])):
            torch.testing.assert_close(list(matrix.parameters())[unit].grad, gradient, rtol=1e-4, atol=1e-4)
        chosen.add(unit)
    assert chosen == {0, 1, 2}


def test_ranks_of_dylora_that_did_not_learn_are_left_alone_by_the_optimizer():
    layer, network, x = on_layer(dylora, "linear", 4, 4)
    disturb(network)
    optimizer = torch.optim.AdamW(network.param_groups(0, 0.1)[0]["params"], lr=0.1, weight_decay=0.5)
    layer(x).square().sum().backward()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)]
    assert changed == [parameter.grad is not None for parameter in network.parameters()] and sum(changed) == 2


# OFT


def rotation(blocks: Tensor, constraint: float) -> Tensor:
    """The orthogonal matrix of blocks by the formula, with an inverse."""
    skew = blocks - blocks.mT
    norm = skew.norm()
    if constraint and norm > constraint:
        skew = skew * constraint / norm
    identity = torch.eye(blocks.shape[-1])
    return torch.block_diag(*((identity + q) @ torch.linalg.inv(identity - q) for q in skew))


@layers
@pytest.mark.parametrize("alpha", [0, 0.02, 5])
def test_oft_turns_the_weight_by_an_orthogonal_matrix_with_its_gradients(kind, alpha):
    layer, network, x = on_layer(oft, kind, 4, alpha)
    disturb(network)
    (adapter,) = network.adapters()
    blocks = adapter.oft_blocks.detach().clone().requires_grad_()
    turn = rotation(blocks, alpha * 24)
    torch.testing.assert_close(turn @ turn.T, torch.eye(24), rtol=1e-5, atol=1e-5)
    expected = with_weight(layer, (turn.T @ layer.weight.flatten(1)).view(layer.weight.shape), x)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(output)
    for result in (output, expected):
        (result * weights).sum().backward()
    torch.testing.assert_close(adapter.oft_blocks.grad, blocks.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hold", [hold_in_fp8, hold_in_int8])
def test_oft_turns_a_layer_that_is_held_in_8_bits(hold):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
    hold(model)
    network = oft.create_network([AdapterTarget(NAME, model[0], "unet")], 4, 0)
    disturb(network)
    x = torch.randn(2, 40, 16)
    before = model(x)
    network.apply_to()
    turn = rotation(network.adapters()[0].oft_blocks.detach(), 0)
    torch.testing.assert_close(model(x), (before - model[0].bias) @ turn + model[0].bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0, 0.01])
def test_oft_files_with_lycoris_names_are_read_by_lycoris_with_the_same_result(alpha, tmp_path):
    theirs = pytest.importorskip("lycoris.modules.diag_oft").DiagOFTModule
    layer, network, x = on_layer(oft, "linear", 6, alpha, names="lycoris")  # it wants more blocks than their size
    disturb(network)
    trained = layer(x)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.check_saved(tmp_path / "a.safetensors")
    network.remove()
    weights = read_weights(tmp_path / "a.safetensors")
    assert set(weights) == {f"{NAME}.oft_blocks", f"{NAME}.alpha"} and weights[f"{NAME}.alpha"] == 0
    blocks = weights[f"{NAME}.oft_blocks"]
    with torch.no_grad():
        module = theirs.make_module_from_state_dict(NAME, layer, blocks, None, weights[f"{NAME}.alpha"])
        change, _ = module.get_diff_weight()
        torch.testing.assert_close(with_weight(layer, layer.weight + change, x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", ["kohya", "lycoris"])
def test_oft_takes_files_under_either_name_and_keeps_its_limit(names, tmp_path):
    layer, network, x = on_layer(oft, "linear", 4, 0.01, names=names)
    disturb(network)
    trained = layer(x)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    for other in ("kohya", "lycoris"):
        network.remove()
        network = oft.create_network([AdapterTarget(NAME, layer, "unet")], 4, 0.01, names=other)
        network.load_weights(tmp_path / "a.safetensors")
        network.apply_to()
        torch.testing.assert_close(layer(x), trained)
        disturb(network, 5)
        assert network.adapters()[0].limited().sub(network.adapters()[0].limited().mT).norm() <= 0.01 * 24 * 1.001


# LoRA


def test_rslora_divides_alpha_by_the_root_of_the_rank_and_says_so_in_the_alpha_of_the_file():
    layer, network, x = on_layer(lora, "linear", 9, 6, rslora="True")
    disturb(network)
    weights = network.state_dict()
    down, up = weights[f"{NAME}.lora_down.weight"], weights[f"{NAME}.lora_up.weight"]
    expected = with_weight(layer, layer.weight + 6 / 9**0.5 * up @ down, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert weights[f"{NAME}.alpha"].item() / 9 == pytest.approx(6 / 9**0.5)  # what others compute


def test_orthogonal_rows_are_as_long_as_kohyas_in_the_mean():
    target = AdapterTarget(NAME, nn.Linear(300, 8), "unet")
    (adapter,) = lora.create_network([target], 6, 1, init="orthogonal").adapters()
    (usual,) = lora.create_network([target], 6, 1).adapters()
    down = adapter.lora_down.weight
    torch.testing.assert_close(down @ down.T, torch.eye(6) / 3, rtol=1e-5, atol=1e-6)
    assert usual.lora_down.weight.norm().item() == pytest.approx(down.norm().item(), rel=0.05)


@layers
def test_pissa_begins_with_nothing_and_with_the_gradients_of_the_weights_largest_part(kind):
    layer, network, x = on_layer(lora, kind, 3, 6, init="pissa")
    assert torch.equal(layer(x), with_weight(layer, layer.weight, x))
    (adapter,) = network.adapters()
    left, values, right = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    down, up = (matrix.weight.detach().clone() for matrix in (adapter.lora_down, adapter.lora_up))
    whole = layer.weight.flatten(1)
    assert (whole - 2 * product(up, down, layer).flatten(1)).norm() < 1.0001 * (whole - best).norm()
    down.requires_grad_(), up.requires_grad_()
    rest = layer.weight - 2 * product(up, down, layer).detach()  # the paper trains on this
    disturb(network, 0.1)
    with torch.no_grad():
        down.copy_(adapter.lora_down.weight), up.copy_(adapter.lora_up.weight)
    output, expected = layer(x), with_weight(layer, rest + 2 * product(up, down, layer), x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for result in (output, expected):
        result.square().sum().backward()
    torch.testing.assert_close(adapter.lora_down.weight.grad, down.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adapter.lora_up.weight.grad, up.grad, rtol=1e-3, atol=1e-3)


@layers
def test_the_file_of_pissa_is_plain_lora_on_the_whole_base_and_its_state_goes_on(kind, tmp_path):
    layer, network, x = on_layer(lora, kind, 3, 6, init="pissa", rank_dropout="0.1")
    disturb(network, 0.1)
    network.eval()
    trained = layer(x)
    path = tmp_path / "a.safetensors"
    network.save_weights(path, None, None)
    network.check_saved(path)
    network.remove()
    again = lora.create_network_from_weights([AdapterTarget(NAME, layer, "unet")], path).eval()
    again.apply_to()
    assert again.adapters()[0].rank == 6
    torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)
    again.remove()
    arguments = {"init": "pissa", "conv_dim": "3", "conv_alpha": "6"}
    resumed = lora.create_network([AdapterTarget(NAME, layer, "unet")], 3, 6, **arguments)
    resumed.load_state_dict(network.state_dict())
    resumed.eval().apply_to()
    assert torch.equal(layer(x), trained)


def test_pissa_of_more_ranks_than_a_layer_has_is_a_mistake():
    with pytest.raises(UserError, match="rank 20 is more than the 16"):
        on_layer(lora, "linear", 20, 1, init="pissa")


def test_ranks_alphas_and_rates_follow_names():
    names = [f"lora_unet_{name}" for name in ("attn2_to_q", "attn2_to_k", "ff_net_2", "proj_in")]
    targets = [AdapterTarget(name, nn.Linear(12, 12), "unet") for name in names]
    network = lora.create_network(
        targets, 4, 2, network_reg_dims="attn2_to_k=0,attn2=8, ff=3", network_reg_alphas="ff=1.5",
        network_reg_lrs="attn._to=0.5", loraplus_lr_ratio="2",
    )  # fmt: skip
    found = {adapter.name: (adapter.rank, adapter.alpha.item()) for adapter in network.adapters()}
    assert found == {names[0]: (8, 2), names[2]: (3, 1.5), names[3]: (4, 2)}
    groups = {group["name"]: (group["lr"], len(group["params"])) for group in network.param_groups(0, 0.1)}
    matched = {"unet attn._to": (0.5, 1), "unet attn._to plus": (1.0, 1)}
    assert groups == matched | {"unet": (0.1, 2), "unet plus": (0.2, 2)}


def test_a_pattern_that_no_layer_has_is_said(caplog):
    lora.create_network([AdapterTarget(NAME, nn.Linear(4, 4), "unet")], 4, 2, network_reg_dims="attn3=8")
    assert "network_reg_dims: no layer's name matches 'attn3'" in caplog.text


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
def test_a_trained_bias_is_added_merged_and_read_again(kind, tmp_path):
    layer, network, x = on_layer(lora, kind, 4, 2, train_bias="True")
    disturb(network)
    weights = network.state_dict()
    change = product(weights[f"{NAME}.lora_up.weight"], weights[f"{NAME}.lora_down.weight"], layer) / 2
    expected = with_weight(layer, layer.weight + change, x, layer.bias + weights[f"{NAME}.diff_b"])
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    bias = network.adapters()[0].diff_b
    torch.testing.assert_close(bias.grad, torch.full((24,), output.numel() / 24))
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.remove()
    again = lora.create_network_from_weights([AdapterTarget(NAME, layer, "unet")], tmp_path / "a.safetensors")
    again.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4)), (lambda: nn.LayerNorm(6), (2, 5, 6))]
)
def test_trained_norms_are_added_merged_and_read_again(make, shape, tmp_path):
    torch.manual_seed(0)
    norm, x = make().requires_grad_(False), torch.randn(shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # without a gradient PyTorch's own backward pass crashes
    targets = [AdapterTarget("lora_unet_norm", norm, "unet")]
    network = lora.create_network(targets, 4, 2, train_norm="True")
    plain = norm(x)
    network.apply_to()
    assert torch.equal(norm(x), plain)
    disturb(network)
    network.set_multiplier(0.5)
    weight, bias = (network.state_dict()[f"lora_unet_norm.{key}"] for key in ("w_norm", "b_norm"))
    by_channel = (slice(None), None, None) if isinstance(norm, nn.GroupNorm) else ()
    expected = plain * (1 + 0.5 * weight[by_channel]) + 0.5 * bias[by_channel]  # of a new norm, weight 1 and bias 0
    output = norm(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
    network.save_weights(tmp_path / "a.safetensors", None, None)
    network.remove()
    again = lora.create_network_from_weights(targets, tmp_path / "a.safetensors")
    again.merge(0.5)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
