"""Adapter files of every kind as layers: what their tensors change is what the modules that wrote them compute."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from library.adapters import algorithms, keys
from library.adapters.file import LABELS, AdapterFile, open_adapter
from library.errors import UserError

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (3, 24)),
    "conv1x1": (lambda: nn.Conv2d(24, 16, 1), (2, 24, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1), (2, 24, 6, 6)),
}
MODULES = {  # what LyCORIS makes them with: module, class, arguments
    "lora": ("locon", "LoConModule", {}),
    "rslora": ("locon", "LoConModule", {"rs_lora": True}),
    "dora": ("locon", "LoConModule", {"weight_decompose": True}),
    "dora, inputs": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "locon, tucker": ("locon", "LoConModule", {"use_tucker": True}),
    "loha": ("loha", "LohaModule", {}),
    "loha, tucker, dora": ("loha", "LohaModule", {"use_tucker": True, "weight_decompose": True}),
    "lokr": ("lokr", "LokrModule", {"lora_dim": 1, "factor": 4}),
    "lokr, both": ("lokr", "LokrModule", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr, tucker": ("lokr", "LokrModule", {"lora_dim": 1, "use_tucker": True, "factor": 4}),
    "lokr, full": ("lokr", "LokrModule", {"full_matrix": True, "alpha": 7}),
    "lokr, dora": ("lokr", "LokrModule", {"factor": 4, "weight_decompose": True}),
    "oft": ("diag_oft", "DiagOFTModule", {}),
    "oft, limited": ("diag_oft", "DiagOFTModule", {"constraint": 0.03}),
    "oft, rescaled": ("diag_oft", "DiagOFTModule", {"rescaled": True}),
    "boft": ("boft", "ButterflyOFTModule", {}),
    "boft, limited, rescaled": ("boft", "ButterflyOFTModule", {"constraint": 0.03, "rescaled": True}),
    "glora": ("glora", "GLoRAModule", {}),
    "ia3": ("ia3", "IA3Module", {}),
    "ia3, inputs": ("ia3", "IA3Module", {"train_on_input": True}),
    "full": ("full", "FullModule", {}),
}
WRITTEN_BY = {
    "LoConModule": "lora",
    "LohaModule": "loha",
    "LokrModule": "lokr",
    "DiagOFTModule": "oft",
    "ButterflyOFTModule": "oft",
    "GLoRAModule": "glora",
    "IA3Module": "ia3",
    "FullModule": "full",
}


def written(path: Path, weights: dict[str, Tensor], **metadata: str) -> AdapterFile:
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, path, metadata)
    return open_adapter(path, "--model")


def of_lycoris(kind: str, layer: nn.Module) -> nn.Module:
    """A module of LyCORIS on the layer, with weights as after training."""
    where, name, arguments = MODULES[kind]
    module_class = getattr(pytest.importorskip(f"lycoris.modules.{where}"), name)
    module = module_class("lora_unet_layer", layer, **({"lora_dim": 4, "alpha": 2} | arguments))
    if name == "FullModule":
        module.apply_to()  # which it must be before it has a state to save
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("kind", MODULES)
def test_the_change_of_a_file_is_what_lycoris_adds_to_the_layer(kind, shape, tmp_path):
    torch.manual_seed(0)
    make, size = LAYERS[shape]
    layer, x = make().requires_grad_(False), torch.randn(size)
    module = of_lycoris(kind, deepcopy(layer))
    weights = {f"lora_unet_layer.{name}": value for name, value in module.state_dict().items()}
    file = written(tmp_path / "a.safetensors", weights)
    assert file.leftovers == []
    found = file.layers["lora_unet_layer"]
    assert found.algorithm == WRITTEN_BY[MODULES[kind][1]]
    merged, bias = layer.weight + found.delta(layer.weight), layer.bias
    if (change := found.bias_delta()) is not None:
        bias = bias + change
    operation = dict(weight=merged, bias=bias) | (dict(stride=2, padding=1) if shape == "conv3x3" else {})
    expected = (F.conv2d if isinstance(layer, nn.Conv2d) else F.linear)(x, **operation)
    assert not torch.allclose(expected, layer(x), atol=1e-2)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_lokr_is_a_product_of_every_element_with_every_element(tmp_path):
    first, second = torch.randn(2, 3), torch.randn(4, 5)
    file = written(tmp_path / "a.safetensors", {"layer.lokr_w1": first, "layer.lokr_w2": second})
    change = file.layers["layer"].delta()
    assert change.shape == (8, 15)
    for out, inside in ((0, 0), (5, 7), (7, 14)):
        assert change[out, inside] == first[out // 4, inside // 5] * second[out % 4, inside % 5]


def test_first_lycoris_files_hold_the_rotation_itself(tmp_path):
    weight = torch.randn(6, 3)
    turn = torch.linalg.qr(torch.randn(2, 3, 3))[0]
    file = written(tmp_path / "a.safetensors", {"layer.oft_diag": turn})
    merged = weight + file.layers["layer"].delta(weight)
    torch.testing.assert_close(merged, torch.block_diag(*turn).T @ weight)


def test_dora_gives_every_output_its_learned_norm(tmp_path):
    weight, magnitude = torch.randn(6, 5), torch.rand(6) + 1
    tensors = {"x.lora_A.weight": torch.randn(2, 5), "x.lora_B.weight": torch.randn(6, 2)}
    file = written(tmp_path / "a.safetensors", tensors | {"x.lora_magnitude_vector": magnitude})
    merged = weight + file.layers["x"].delta(weight)
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    direction = weight + tensors["x.lora_B.weight"] @ tensors["x.lora_A.weight"]
    torch.testing.assert_close(F.normalize(merged), F.normalize(direction))


def test_norms_and_biases_change_by_what_is_written(tmp_path):
    tensors = {"norm.w_norm": torch.randn(4), "norm.b_norm": torch.randn(4), "bias.diff_b": torch.randn(4)}
    file = written(tmp_path / "a.safetensors", tensors)
    weight = torch.randn(4, 2)
    assert torch.equal(file.layers["norm"].delta(), tensors["norm.w_norm"])
    assert torch.equal(file.layers["norm"].bias_delta(), tensors["norm.b_norm"])
    assert torch.equal(file.layers["bias"].delta(weight), torch.zeros(4, 2))
    assert torch.equal(file.layers["bias"].bias_delta(), tensors["bias.diff_b"])


def test_without_alpha_the_scale_is_one(tmp_path):
    down, up = torch.randn(2, 5), torch.randn(6, 2)
    file = written(tmp_path / "a.safetensors", {"x.lora_down.weight": down, "x.lora_up.weight": up})
    torch.testing.assert_close(file.layers["x"].delta(), up @ down)
    assert (file.layers["x"].alpha, file.layers["x"].rank) == (None, 2)


@pytest.mark.parametrize("end", [end for end, part in keys.ENDS.items() if part in ("up", "down")])
def test_every_spelling_of_lora_is_read(end, tmp_path):
    other = {part: ends for ends, part in keys.ENDS.items() if ends != end}
    wanted = "down" if keys.ENDS[end] == "up" else "up"
    weights = {f"a.to_q{end}": torch.randn(2, 2), f"a.to_q{other[wanted]}": torch.randn(2, 2)}
    file = written(tmp_path / "a.safetensors", weights)
    assert file.leftovers == [] and file.layers["a.to_q"].algorithm == "lora"


def test_what_no_algorithm_has_is_left_over(tmp_path):
    weights = {"x.lora_down.weight": torch.randn(2, 5), "x.lora_up.weight": torch.randn(6, 2)}
    others = {"y.alpha": torch.ones(()), "emb.string_to_param": torch.ones(1), "z.weight": torch.ones(2)}
    file = written(tmp_path / "a.safetensors", weights | others, ss_network_dim="2")
    assert sorted(file.leftovers) == sorted(others)
    assert list(file.layers) == ["x"] and file.metadata == {"ss_network_dim": "2"}


def test_a_pickle_is_read_too(tmp_path):
    torch.save({"x.lora_down.weight": torch.ones(2, 5), "x.lora_up.weight": torch.ones(6, 2)}, tmp_path / "a.pt")
    assert open_adapter(tmp_path / "a.pt", "--model").layers["x"].delta().eq(2).all()


def test_a_change_that_depends_on_the_weight_asks_for_it(tmp_path):
    file = written(tmp_path / "a.safetensors", {"x.oft_blocks": torch.zeros(2, 3, 3)})
    with pytest.raises(UserError, match="x: what OFT does depends on the model's own weight"):
        file.layers["x"].delta()
    with pytest.raises(UserError, match=r"x: the tensors of this OFT do not fit the model's layer, which has \(5, 4\)"):
        file.layers["x"].delta(torch.zeros(5, 4))


def test_every_algorithm_has_keys_a_formula_and_a_name():
    assert algorithms.ALGORITHMS.keys() == keys.ALGORITHMS.keys() == LABELS.keys()
