"""--blocks_to_swap: weights that come and go, results that stay what they are."""

import copy
import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from library.errors import UserError
from library.families import row_of_kind
from library.families.modules import checkpoint_gradients
from library.layers.fp8 import hold_in_fp8
from library.layers.int8 import hold_in_int8
from library.layers.nf4 import hold_in_nf4
from library.layers.swapped import Arrival, CudaMover, Mover, SwappedBlocks, blocks_of, largest_blocks, weights_of
from library.recipes.memory_table import META, estimate
from library.recipes.network import load_family
from tests import tiny
from tests.test_memory_table import family_name, options_for
from tests.test_unet_blocks import gradients_of, loss_of, unet_with_network
from train_network import train

CPU = torch.device("cpu")


class WatchedMover(Mover):
    """Its main memory looks like NaN to whoever computes with it, and it knows how many copies are alive."""

    def __init__(self):
        super().__init__(CPU)
        self.truth: dict[int, Tensor] = {}  # by what stands for it
        self.fetched: list[int] = []  # blocks, by their first weight
        self.alive: dict[int, int] = {}  # bytes by storage
        self.peak = 0

    def to_main_memory(self, weight: Tensor) -> Tensor:
        kept = weight.new_full(weight.shape, float("nan")) if weight.is_floating_point() else weight.clone()
        self.truth[id(kept)] = weight.clone()
        return kept

    def fetch(self, kept: Sequence[Tensor]) -> Arrival:
        self.fetched.append(id(kept[0]))
        arrival = super().fetch([self.truth[id(value)] for value in kept])
        for value in arrival.weights:
            storage = value.untyped_storage()
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return arrival


def swapped_unet(kind: str, num_blocks: int, **more) -> tuple[nn.Module, nn.Module, SwappedBlocks]:
    unet, network = unet_with_network(kind, True, **more)
    return unet, network, SwappedBlocks(unet, largest_blocks(unet, num_blocks).values(), WatchedMover())


def running_order(unet: nn.Module, kind: str, swapped: SwappedBlocks) -> list[int]:
    """The first weights of swapped blocks, as the forward pass comes by."""
    order = []
    firsts = {id(block.weights[0]): id(block.kept[0]) for block in swapped.blocks}
    hooks = [
        block.register_forward_pre_hook(lambda block, _: order.append(firsts[id(weights_of(block)[0])]))
        for block in blocks_of(unet).values()
        if id(weights_of(block)[0]) in firsts
    ]
    with torch.no_grad():
        loss_of(unet, kind)
    for hook in hooks:
        hook.remove()
    return order


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_losses_and_gradients_are_the_same_with_two_blocks_at_a_time(kind, conv, checkpointing):
    plain, plain_network = unet_with_network(kind, True, conv)
    unet, network, swapped = swapped_unet(kind, len(blocks_of(plain)), conv=conv)
    order, mover = running_order(unet, kind, swapped), swapped.mover
    assert len(order) == len(swapped.blocks) > 10
    for model in (plain, unet) if checkpointing else ():
        checkpoint_gradients(model, (), None)
    for is_first in (True, False):
        mover.fetched.clear()
        for one in (network, plain_network):
            one.zero_grad()
        ours, wanted = gradients_of(unet, network, kind), gradients_of(plain, plain_network, kind)
        assert all(map(torch.equal, ours, wanted))
        trained = order if conv else order[{"sd1": 1, "sdxl": 3}[kind] :]  # before the first adapter no gradient goes
        there = [] if is_first else [block for block in order[:2] if block == trained[0]]  # from the pass before
        assert mover.fetched == [block for block in order if block not in there] + trained[-2::-1]
    sizes = sorted((block.num_bytes for block in swapped.blocks), reverse=True)
    assert sum(sizes[:1]) < mover.peak <= sum(sizes[:2]) < sum(sizes) / 3
    with torch.no_grad():
        assert torch.equal(loss_of(unet.eval(), kind), loss_of(plain.eval(), kind))
    assert not swapped.present and not mover.alive


def test_passes_that_are_broken_off_and_passes_with_one_backward_pass_together():
    plain, plain_network = unet_with_network("sd1", True)
    unet, network, swapped = swapped_unet("sd1", 5)
    assert [block.num_bytes for block in swapped.blocks] == sorted(
        (sum(weight.nbytes for weight in weights_of(block)) for block in blocks_of(plain).values()), reverse=True
    )[:5]
    wanted = gradients_of(plain, plain_network, "sd1")
    loss_of(unet, "sd1")  # without a backward pass
    hook = unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(unet, "sd1")
    hook.remove()
    assert all(map(torch.equal, gradients_of(unet, network, "sd1"), wanted))
    for model, its_network in ((unet, network), (plain, plain_network)):
        its_network.zero_grad()
        (loss_of(model, "sd1") + 2 * loss_of(model, "sd1")).backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), plain_network.parameters(), strict=True)
    )
    assert swapped.mover.peak <= 2 * max(block.num_bytes for block in swapped.blocks)


@pytest.mark.parametrize("hold", [hold_in_fp8, hold_in_int8, hold_in_nf4])
def test_weights_in_fewer_bits_are_moved_as_they_are(hold):
    (plain, plain_network), (unet, network) = (unet_with_network("sd1", True) for _ in range(2))
    for model, its_network in ((plain, plain_network), (unet, network)):
        its_network.remove()
        hold(model)
        its_network.apply_to()
    swapped = SwappedBlocks(unet, largest_blocks(unet, 20).values(), WatchedMover())
    dtypes = {weight.dtype for block in swapped.blocks for weight in block.weights}
    assert dtypes & {torch.float8_e4m3fn, torch.int8, torch.uint8}
    assert all(map(torch.equal, gradients_of(unet, network, "sd1"), gradients_of(plain, plain_network, "sd1")))


def test_what_waits_is_a_whole_model():
    unet, _ = unet_with_network("sdxl", True)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    SwappedBlocks(unet, largest_blocks(unet, 10).values(), Mover(CPU))
    loss_of(unet, "sdxl").backward()
    with torch.no_grad():
        loss_of(unet, "sdxl")
    after = unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_memory_table_sees_what_waits(model_file, pictures, tmp_path):
    words = dict(cache_latents=True, network_train_unet_only=True, optimizer_type="SGD")
    name = family_name(model_file)
    plain, swapped = (
        estimate(options_for(model_file, pictures, tmp_path, **words, **more), name, (64, 64), False)
        for more in ({}, {"blocks_to_swap": 12})
    )
    unet = tiny.models({"sd": "sd1", "sdxl": "sdxl"}[name]).unet
    frozen = copy.deepcopy(unet).requires_grad_(False)
    sizes = [sum(weight.nbytes for weight in weights_of(block)) for block in largest_blocks(frozen, 12).values()]
    assert plain.frozen - swapped.frozen == pytest.approx(sum(sizes), rel=1e-3)
    assert sum(sizes[2:]) <= plain.training - swapped.training < sum(sizes)


def test_weights_that_wait_are_read_to_main_memory(tiny_sdxl_file, pictures, tmp_path):
    options = options_for(tiny_sdxl_file, pictures, tmp_path, blocks_to_swap=5)
    family = load_family(options, "sdxl", META)
    family.parts.swap_blocks(5)
    waiting = {id(weight) for block in largest_blocks(family.unet, 5).values() for weight in weights_of(block)}
    read = dict(family.unet.named_parameters())
    assert {name for name, value in read.items() if value.untyped_storage().nbytes() < value.nbytes} == {
        name for name, value in read.items() if id(value) in waiting
    }


def test_without_a_gpu_a_line_says_so_and_the_result_is_the_same(tiny_file, pictures, tmp_path, capsys):
    given = {"plain": {}, "swapped": {"blocks_to_swap": 4}}
    for name, more in given.items():
        train(tiny.arguments(tiny_file, pictures, tmp_path / name, **more))
    assert capsys.readouterr().err.count("--blocks_to_swap has no effect: there is no NVIDIA GPU") == 1
    ours, plain = (load_file(tmp_path / name / "lora.safetensors") for name in given)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"blocks_to_swap": -1}, "--blocks_to_swap must be at least 0, got -1"),
        (
            {"blocks_to_swap": 39},
            "--blocks_to_swap must be at most 38, the blocks of the U-Net of a Stable",
        ),
        ({"blocks_to_swap": 38}, "--blocks_to_swap must be at most 18, the blocks of this U-Net, got 38"),
        ({"blocks_to_swap": 2, "torch_compile": True}, "--blocks_to_swap does not go with --torch_compile"),
    ],
)
def test_mistakes(words, sentence, tiny_file, pictures, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train(tiny.arguments(tiny_file, pictures, tmp_path / "out", **words))
    assert not (tmp_path / "out" / "lora.safetensors").exists()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_full_size_unets_have_as_many_blocks_as_families_say(kind):
    sdxl = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    )  # fmt: skip
    with META:
        unet = UNet2DConditionModel(cross_attention_dim=768, **(sdxl if kind == "sdxl" else {}))
    assert len(blocks_of(unet)) == row_of_kind(kind).num_blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_results_are_the_same_and_less_memory_is_taken(checkpointing):
    device, found = torch.device("cuda"), []
    for is_swapped in (False, True):
        gc.collect()
        before = torch.cuda.memory_allocated()
        unet, network = unet_with_network("sdxl", True)
        network.to(device)
        if is_swapped:
            waiting = {id(weight) for block in blocks_of(unet).values() for weight in weights_of(block)}
            for value in unet.parameters():
                value.data = value.data if id(value) in waiting else value.data.to(device)
            swapped = SwappedBlocks(unet, blocks_of(unet).values(), CudaMover(device))
            assert all(kept.is_pinned() for block in swapped.blocks for kept in block.kept)
        unet = unet if is_swapped else unet.to(device)
        if checkpointing:
            checkpoint_gradients(unet, (), None)
        held = torch.cuda.memory_allocated() - before
        for _ in range(3):
            network.zero_grad()
            gradients = gradients_of(unet, network, "sdxl", torch.float32, device)
        found.append((gradients, held))
        del unet, network
    (plain, held), (ours, held_swapped) = found
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert held_swapped < held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_weights_are_read_to_main_memory_and_training_is_the_same(tiny_sdxl_file, pictures, tmp_path):
    options = options_for(tiny_sdxl_file, pictures, tmp_path, blocks_to_swap=10)
    unet = load_family(options, "sdxl", torch.device("cuda")).unet
    waiting = {id(weight) for block in largest_blocks(unet, 10).values() for weight in weights_of(block)}
    assert all((value.device == CPU) == (id(value) in waiting) for value in unet.parameters())
    given = {"plain": {}, "swapped": {"blocks_to_swap": 10}}
    for name, more in given.items():
        words = dict(optimizer_type="SGD", learning_rate=0.1, max_train_epochs=None, max_train_steps=5)
        train(tiny.arguments(tiny_sdxl_file, pictures, tmp_path / name, **words, **more))
    ours, plain = (load_file(tmp_path / name / "lora.safetensors") for name in given)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
