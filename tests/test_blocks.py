"""Ranks and learning rates by block: what kohya's arguments mean, in numbers, and what is said when they are wrong."""

import math

import pytest
from torch import nn

from library.errors import UserError
from library.families.base import AdapterTarget
from library.families.blocks import BlockLayout
from networks import lora, lora_arguments
from networks.blocks import block_lr_weights, listed_lr_weights, lr_weights_or_preset

SD = BlockLayout(num_down=12, num_mid=1, num_up=12)
SDXL = BlockLayout(num_down=9, num_mid=3, num_up=9, num_before=1, num_after=1)
SMALL = BlockLayout(num_down=2, num_mid=1, num_up=2)


def targets(layout: BlockLayout | None = SMALL) -> list[AdapterTarget]:
    """A Linear and a 3x3 convolution in every block, one outside of all, and one of the text encoder."""
    found = [
        AdapterTarget("lora_te_a", nn.Linear(8, 8), "te"),
        AdapterTarget("lora_unet_outside", nn.Linear(8, 8), "unet", None, layout),
    ]
    for block in range(layout.num_blocks if layout else 0):
        found.append(AdapterTarget(f"lora_unet_{block}", nn.Linear(8, 8), "unet", block, layout))
        found.append(AdapterTarget(f"lora_unet_{block}_conv", nn.Conv2d(8, 8, 3), "unet", block, layout))
    return found


def ranks_and_scales(**arguments: str) -> dict[str, tuple[int, float]]:
    lora.check_arguments(arguments)
    network = lora.create_network(targets(), 4, 2, **arguments)
    return {name.removeprefix("lora_"): (child.rank, child.scale) for name, child in network.named_children()}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("linear", [0, 0.25, 0.5, 0.75, 1]),
        ("reverse_linear", [1, 0.75, 0.5, 0.25, 0]),
        ("sine", [0, math.sin(math.pi / 8), math.sin(math.pi / 4), math.sin(3 * math.pi / 8), 1]),
        ("cosine", [1, math.cos(math.pi / 8), math.cos(math.pi / 4), math.cos(3 * math.pi / 8), 0]),
        ("zeros", [0] * 5),
        ("linear+.5", [0.5, 0.75, 1, 1.25, 1.5]),
        ("Zeros + 0.3", [0.3] * 5),
        ("0.5", [0.5] * 5),
        ("1,0.5,,2,3", [1, 0.5, 0, 2, 3]),
    ],
)
def test_lists_and_presets_in_numbers(text, weights):
    assert lr_weights_or_preset(text).of("down_lr_weight", 5) == pytest.approx(weights, abs=1e-15)


def test_cosine_ends_in_0_so_that_the_last_block_is_left_out():
    assert lr_weights_or_preset("cosine").of("down_lr_weight", 12)[-1] == 0


@pytest.mark.parametrize(
    ("text", "weights", "said"),
    [("0.5,0.25", [0.5, 0.25, 1], "2 of 3 numbers"), ("1,2,3,4", [1, 2, 3], "4 numbers, the first 3 count")],
)
def test_lists_of_another_length_are_filled_with_1_or_cut(text, weights, said, caplog):
    assert listed_lr_weights(text).of("up_lr_weight", 3) == weights
    assert "up_lr_weight" in caplog.text and said in caplog.text


def weights_of(layout: BlockLayout, **arguments: str) -> list[float] | None:
    given = {name: lora_arguments.ARGUMENTS[name](text) for name, text in arguments.items()}
    return block_lr_weights(given, layout)


def test_lists_stand_in_the_order_down_middle_up_and_what_is_not_given_is_1():
    assert weights_of(SD, down_lr_weight="linear", mid_lr_weight="0.3") == [
        *[i / 11 for i in range(12)], 0.3, *[1.0] * 12,
    ]  # fmt: skip
    assert weights_of(SD, up_lr_weight="0.5") == [*[1.0] * 13, *[0.5] * 12]
    assert weights_of(SDXL, down_lr_weight="0.5", mid_lr_weight="2,3,4", up_lr_weight="0.25") == [
        1.0, *[0.5] * 9, 2, 3, 4, *[0.25] * 9, 1.0,
    ]  # fmt: skip
    assert weights_of(SD) is None


def test_weights_up_to_the_threshold_are_0():
    weights = weights_of(SMALL, down_lr_weight="0.2,0.21", up_lr_weight="-1,1", block_lr_zero_threshold="0.2")
    assert weights == [0, 0.21, 1.0, 0, 1]


def test_ranks_and_alphas_by_block():
    assert ranks_and_scales(block_dims="1,2,0,4,5", block_alphas="1,1,1,0,10") == {
        "te_a": (4, 0.5), "unet_outside": (4, 0.5),
        "unet_0": (1, 1.0), "unet_1": (2, 0.5), "unet_3": (4, 1.0), "unet_4": (5, 2.0),
    }  # fmt: skip


def test_convolutions_have_ranks_and_alphas_of_their_own():
    found = ranks_and_scales(conv_block_dims="0,1,2,4,8", conv_block_alphas="1,2,1,1,2", block_dims="0,0,0,0,3")
    assert found == {
        "te_a": (4, 0.5), "unet_outside": (4, 0.5), "unet_1_conv": (1, 2.0), "unet_2_conv": (2, 0.5),
        "unet_3_conv": (4, 0.25), "unet_4": (3, 2 / 3), "unet_4_conv": (8, 0.25),
    }  # fmt: skip
    found = ranks_and_scales(conv_dim="2", conv_alpha="4", conv_block_alphas="1,2,3,4,0", mid_lr_weight="0")
    convolutions = {name: value for name, value in found.items() if name.endswith("conv")}
    assert convolutions == {
        "unet_0_conv": (2, 0.5), "unet_1_conv": (2, 1.0), "unet_3_conv": (2, 2.0), "unet_4_conv": (2, 1.0),
    }  # fmt: skip


@pytest.mark.parametrize("argument", ["block_alphas", "conv_block_dims"])
def test_values_by_block_count_without_block_dims(argument):
    found = ranks_and_scales(**{argument: "1,2,3,4,5"})
    assert found["unet_2" if argument == "block_alphas" else "unet_2_conv"] == (
        (4, 0.75) if argument[0] == "b" else (3, 1 / 3)
    )


def test_every_block_has_its_learning_rate_and_its_name_and_the_text_encoder_keeps_its_own():
    network = lora.create_network(
        targets(), 4, 2, down_lr_weight="0,0.5", up_lr_weight="2,1", loraplus_unet_lr_ratio="8"
    )
    groups = {group["name"]: group for group in network.param_groups(1e-5, 1e-4)}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx({
        "textencoder": 1e-5,
        "unet": 1e-4, "unet plus": 8e-4,  # the layer that is in no block
        "unet_block1": 5e-5, "unet_block1 plus": 4e-4,
        "unet_block2": 1e-4, "unet_block2 plus": 8e-4,
        "unet_block3": 2e-4, "unet_block3 plus": 16e-4,
        "unet_block4": 1e-4, "unet_block4 plus": 8e-4,
    })  # fmt: skip
    adapters = dict(network.named_children())
    assert "lora_unet_0" not in adapters
    assert groups["unet_block3"]["params"] == [adapters["lora_unet_3"].lora_down.weight]
    assert groups["unet_block3 plus"]["params"] == [adapters["lora_unet_3"].lora_up.weight]
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(network.parameters()))


def test_blocks_of_a_file_with_weight_0_stay_in_it_and_are_not_trained(tmp_path):
    network = lora.create_network(targets(), 4, 2)
    network.save_weights(tmp_path / "a.safetensors", None, None)
    again = lora.create_network_from_weights(targets(), tmp_path / "a.safetensors", down_lr_weight="0,0.5")
    assert again.state_dict().keys() == network.state_dict().keys()
    names = [group["name"] for group in again.param_groups(0.0, 1e-4)]
    assert names == ["unet", "unet_block1", "unet_block2", "unet_block3", "unet_block4"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"block_dims": "1,2"}, "block_dims takes 5 numbers, one a block, got 2"),
        ({"block_dims": "1,2,3,4,x"}, "block_dims must be whole numbers from 0, separated by commas, got '1,2,3,4,x'"),
        ({"block_dims": "1,2,3,4,-5"}, "block_dims must be whole numbers from 0"),
        ({"conv_block_dims": "1,2,3,4,5", "conv_block_alphas": "1"}, "conv_block_alphas takes 5 numbers"),
        ({"block_alphas": "1,,3"}, "block_alphas must be numbers, separated by commas"),
        (
            {"down_lr_weight": "cosin"},
            "down_lr_weight must be numbers .* or cosine, sine, linear, reverse_linear, zeros",
        ),
        ({"up_lr_weight": "linear+x"}, "up_lr_weight must be numbers"),
        ({"mid_lr_weight": "linear"}, "mid_lr_weight must be numbers, separated by commas, got 'linear'"),
        ({"conv_block_alphas": "1,2,3,4,5"}, "conv_block_alphas needs conv_dim or conv_block_dims"),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold needs down_lr_weight or mid_lr_weight or up"),
        ({"down_lr_weights": "1"}, "no argument down_lr_weights; did you mean down_lr_weight?"),
    ],
)
def test_mistakes_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ranks_and_scales(**arguments)


def test_a_model_without_numbered_blocks_takes_no_values_for_them():
    with pytest.raises(UserError, match="down_lr_weight: no layer that is trained here is in a numbered block"):
        lora.create_network(targets(None), 4, 2, down_lr_weight="1")
