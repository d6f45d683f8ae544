"""Verdicts on adapter files are those of the programs themselves: diffusers is asked, others were measured."""

import gzip
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.base_model import open_base_model
from library.adapters.consumers import CONSUMERS, TRAITS
from library.adapters.file import open_adapter
from library.adapters.keys import LayerKeys
from library.adapters.verdicts import FileVerdict, knows_name, verify
from library.errors import EXIT_FINDINGS, UserError
from library.families.checkpoints import Models
from library.options.groups import TrainNetworkOptions
from networks.verify_lora import main
from tests import tiny
from tests.adapter_files import METADATA, targets, weights_of
from tests.algorithms import everything
from tests.test_adapters import MODULES
from tests.test_consumers import diffusers_pipeline
from train_network import train

KEYS = Path(__file__).parent / "data" / "keys"
CASES = [*(("sd1", algorithm) for algorithm in MODULES), *(("sdxl", name) for name in ("lora", "dora"))]


@pytest.fixture
def models():
    """The toy models of a kind; diffusers' loader changes them."""
    yield tiny.models
    tiny.forget_models()


@pytest.fixture
def file_of(tiny_file, tiny_sdxl_file):
    return {"sd1": tiny_file, "sdxl": tiny_sdxl_file}.get


def written(path: Path, kind: str, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(weights, path, METADATA[kind] if metadata is None else metadata)
    return path


def verdict_of(found: FileVerdict, name: str) -> str:
    return next(consumer.verdict for consumer in found.consumers if consumer.name == name)


def error_in_diffusers(models: Models, kind: str, checkpoint: Path, path: Path) -> float | None:
    """The largest relative error of what diffusers changes in a layer; None where it refuses the file."""
    adapter, base = open_adapter(path, "--model"), open_base_model(str(checkpoint), "--model")
    before = {target.name: (target.layer, target.layer.weight.detach().clone()) for target in targets(models, kind)}
    family = tiny.load_family(TrainNetworkOptions(pretrained_model_name_or_path=str(checkpoint)))
    pipeline: StableDiffusionPipeline = diffusers_pipeline(family, kind)
    try:
        pipeline.load_lora_weights(str(path))
    except (ValueError, KeyError, RuntimeError):
        return None
    pipeline.fuse_lora()
    by_place = {id(base.find(name)): layer for name, layer in adapter.layers.items()}
    errors = []
    for name, (layer, weight) in before.items():
        wanted = by_place[id(base.find(name))].delta(weight)
        errors.append(((layer.weight - weight - wanted).norm() / wanted.norm()).item())
    return max(errors)


@pytest.mark.parametrize(("kind", "algorithm"), CASES)
def test_diffusers_does_as_the_verdict_says(kind, algorithm, models, file_of, tmp_path):
    path = written(tmp_path / "a.safetensors", kind, weights_of(models(kind), kind, algorithm))
    error = error_in_diffusers(models(kind), kind, file_of(kind), path)
    meant = {"exact": error is not None and error < 1e-5, "wrong": error is not None and error > 0.1}
    meant["refused"] = error is None
    assert meant[verdict_of(verify(path, ""), "diffusers")], error


def with_ends(weights: dict[str, Tensor], ends: dict[str, str]) -> dict[str, Tensor]:
    """The weights with other names of tensors; "" leaves them out."""
    renamed = {}
    for key, value in weights.items():
        name, _, end = key.partition(".")
        if ends.get(end, end):
            renamed[f"{name}.{ends.get(end, end)}"] = value
    return renamed


PEFT_ENDS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def with_odd_alphas(weights: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    keys = [key for key in weights if re.match(rf"{pattern}.*\.alpha$", key)]
    assert keys
    return weights | {key: torch.tensor(7.0) for key in keys}


ODD_ALPHAS = {  # kind of model, what is done to a LoRA's alphas, and whether diffusers applies it exactly
    "convolutions": ("sd1", lambda weights: with_odd_alphas(weights, ".*resnets"), True),
    "attention": ("sd1", lambda weights: with_odd_alphas(weights, ".*attn1_to_q"), False),
    "CLIP-L": ("sd1", lambda weights: with_odd_alphas(weights, "lora_te_.*fc1"), False),
    "CLIP-G": ("sdxl", lambda weights: with_odd_alphas(weights, "lora_te2_.*fc1"), True),
    "none in some": ("sd1", lambda weights: {k: v for k, v in weights.items() if not k.endswith("to_q.alpha")}, False),
}


@pytest.mark.parametrize("case", ODD_ALPHAS)
def test_diffusers_finds_alphas_as_the_verdict_says_and_baking_helps(case, models, file_of, tmp_path):
    kind, change, is_exact = ODD_ALPHAS[case]
    path = written(tmp_path / "a.safetensors", kind, change(weights_of(models(kind), kind, "lora")))
    error = error_in_diffusers(models(kind), kind, file_of(kind), path)
    assert (error < 1e-5) == is_exact == (verdict_of(verify(path, ""), "diffusers") == "exact"), error
    main([str(path), "--bake", str(tmp_path / "b.safetensors")])
    tiny.forget_models()
    assert error_in_diffusers(models(kind), kind, file_of(kind), tmp_path / "b.safetensors") < 1e-5


ODD_FILES = {  # what is done to a LoRA's weights
    "names of PEFT's matrices": lambda weights: with_ends(weights, PEFT_ENDS | {"alpha": ""}),
    "lone alpha": lambda weights: weights | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
    "no alpha": lambda weights: with_ends(weights, {"alpha": ""}),
    "key of nothing": lambda weights: weights | {"bundle_emb.me.string_to_param.*": torch.ones(1, 4)},
    "oft_unet": lambda weights: {key.replace("lora_unet", "oft_unet"): value for key, value in weights.items()},
}


@pytest.mark.parametrize("case", ODD_FILES)
def test_diffusers_takes_the_names_that_the_verdict_says(case, models, file_of, tmp_path):
    weights = ODD_FILES[case](weights_of(models("sd1"), "sd1", "lora"))
    path = written(tmp_path / "a.safetensors", "sd1", weights)
    error = error_in_diffusers(models("sd1"), "sd1", file_of("sd1"), path)
    assert verdict_of(verify(path, ""), "diffusers") == ("refused" if error is None else "exact")
    assert (case == "no alpha") == (error is not None)


@pytest.mark.parametrize(
    ("golden", "kind"),
    [("sd15_conv", "sd1"), ("sd21_default", "sd2"), ("sdxl_default", "sdxl"), ("sdxl_conv", "sdxl")],
)
def test_every_name_that_kohya_writes_is_known_to_all(golden, kind):
    keys = json.loads(gzip.decompress((KEYS / f"{golden}.json.gz").read_bytes()))
    layers = [LayerKeys(name, "lora", {}) for name in {key.partition(".")[0] for key in keys}]
    for consumer in CONSUMERS.values():
        assert all(knows_name(consumer, kind, layer) for layer in layers)
    rotated = [LayerKeys(layer.name.replace("lora_", "oft_"), "oft", {}) for layer in layers if "_unet_" in layer.name]
    known = {
        name for name, consumer in CONSUMERS.items() if all(knows_name(consumer, kind, layer) for layer in rotated)
    }
    assert known == ({"WebUI"} if kind == "sdxl" else set())


def test_numbers_in_a_file_decide_about_oft_and_alpha(models, tmp_path):
    weights = weights_of(models("sd1"), "sd1", "oft")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        alphas = {key: torch.tensor(3, dtype=dtype) for key in weights if key.endswith("alpha")}
        limited = verify(written(tmp_path / "a.safetensors", "sd1", weights | alphas), "")
        assert verdict_of(limited, "ComfyUI") == "wrong" and verdict_of(limited, "WebUI") == "exact"
        free = {key: torch.zeros_like(value) for key, value in alphas.items()}
        plain = verify(written(tmp_path / "a.safetensors", "sd1", weights | free), "")
        assert verdict_of(plain, "ComfyUI") == "exact" and verdict_of(plain, "Forge") == "refused"
    lora = with_ends(weights_of(models("sd1"), "sd1", "lora"), PEFT_ENDS)
    assert verdict_of(verify(written(tmp_path / "a.safetensors", "sd1", lora), ""), "WebUI") == "wrong"
    same = {key: torch.tensor(4.0) if key.endswith("alpha") else value for key, value in lora.items()}
    assert verdict_of(verify(written(tmp_path / "a.safetensors", "sd1", same), ""), "WebUI") == "exact"


@pytest.mark.parametrize(
    ("metadata", "note"),
    [
        ({}, "no metadata"),
        (METADATA["sdxl"], "hides it while a model of SD 1.x is loaded"),
        (METADATA["sd1"] | {"modelspec.architecture": "flux-1-dev/lora"}, "Forge takes it for flux-1-dev/lora"),
        (METADATA["sd1"] | {"ss_tag_frequency": "a cat"}, "ss_tag_frequency is not shown"),
        (METADATA["sd1"] | {"modelspec.architecture": "stable-diffusion-v1/lora"}, None),
    ],
)
def test_metadata_that_hides_a_file_is_told(metadata, note, models, tmp_path):
    weights = weights_of(models("sd1"), "sd1", "lora")
    notes = verify(written(tmp_path / "a.safetensors", "sd1", weights, metadata), "").notes
    assert not notes if note is None else note in " ".join(notes)


def test_every_program_has_an_outcome_for_every_trait():
    assert all(trait.outcomes.keys() == CONSUMERS.keys() for trait in TRAITS.values())


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("sd1", "lokr, tucker"), ("sdxl", "locon, tucker"), ("sd1", "dora"), ("sd1", "oft, limited")],
)
def test_a_baked_file_does_the_same_everywhere(kind, algorithm, models, file_of, tmp_path, capsys):
    path = written(tmp_path / "混 合.safetensors", kind, weights_of(models(kind), kind, algorithm))
    plain = tmp_path / "plain.safetensors"
    words = [str(path), "--bake", str(plain), "--rank", "512", "--model", str(file_of(kind))]
    main(words)
    assert capsys.readouterr().out.count("applied exactly") >= len(CONSUMERS)
    base = open_base_model(str(file_of(kind)), "--model")
    baked = open_adapter(plain, "--model")
    assert baked.layers.keys() == (adapter := open_adapter(path, "--model")).layers.keys()
    for name, layer in adapter.layers.items():
        weight = base.read(base.find(name).weight)
        wanted = layer.delta(weight)
        assert (baked.layers[name].delta(weight) - wanted).norm() < 2e-5 * wanted.norm()
    assert error_in_diffusers(models(kind), kind, file_of(kind), plain) < 1e-4


def test_a_baked_file_of_small_rank_has_the_error_that_is_told(models, file_of, tmp_path, capsys):
    weights = weights_of(models("sd1"), "sd1", "loha") | {"lora_te_text_model_final_layer_norm.w_norm": torch.ones(32)}
    path = written(tmp_path / "a.safetensors", "sd1", weights)
    main([str(path), "--bake", str(tmp_path / "b.safetensors"), "--rank", "3"])
    lost = total = 0.0
    baked = open_adapter(tmp_path / "b.safetensors", "")
    base = open_base_model(str(file_of("sd1")), "")
    for name, layer in open_adapter(path, "").layers.items():
        if layer.algorithm == "norm":
            continue
        weight = base.read(base.find(name).weight)
        values = torch.linalg.svdvals(layer.delta(weight).flatten(1).double())
        lost, total = lost + values[3:].square().sum(), total + values.square().sum()
        assert baked.layers[name].rank == min(3, len(values))
    told = capsys.readouterr().err
    assert f"{(lost / total) ** 0.5:.2g} in all" in told
    assert "no place for them: 1 tensor, e.g. lora_te_text_model_final_layer_norm.w_norm" in told


def test_exit_codes_and_mistakes(models, tmp_path, capsys):
    good = written(tmp_path / "good.safetensors", "sd1", weights_of(models("sd1"), "sd1", "lora"))
    bad = written(tmp_path / "bad.safetensors", "sd1", weights_of(models("sd1"), "sd1", "dora"))
    main([str(good)])
    with pytest.raises(SystemExit) as ended:
        main([str(good), str(bad)])
    assert ended.value.code == EXIT_FINDINGS
    assert "--bake OUT.safetensors --model BASE_MODEL" in capsys.readouterr().out
    flux = written(
        tmp_path / "flux.safetensors",
        "sd1",
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(1, 1)},
    )
    for words, message in [
        ([str(bad), "--bake", str(tmp_path / "c.safetensors")], "--model is needed for --bake"),
        ([str(good), str(bad), "--bake", "c.safetensors"], "--bake writes one file, got 2"),
        ([str(good), "--bake", str(bad)], "is there already; --overwrite"),
        ([str(flux)], "no layers of SD 1.x, 2.x or SDXL"),
    ]:
        with pytest.raises(UserError, match=message):
            main(words)
    assert not (tmp_path / "c.safetensors").exists()


def test_training_ends_with_the_verdicts(tiny_file, pictures, tmp_path, capsys):
    train(tiny.arguments(tiny_file, pictures, tmp_path / "one", max_train_epochs=None, max_train_steps=1))
    num_keys = len(load_file(tmp_path / "one" / "lora.safetensors"))
    told = capsys.readouterr().err
    assert f"ComfyUI, WebUI, Forge, diffusers take all {num_keys} keys and apply them exactly" in told
    arguments = dict(network_module="lycoris.kohya", network_args=["algo=loha"], max_train_epochs=None)
    train(tiny.arguments(tiny_file, pictures, tmp_path / "two", max_train_steps=1, **arguments))
    told = capsys.readouterr().err
    assert "LoHa" in told and "refused: a key that it does not know" in told and "--bake" in told


EVERYWHERE, IN_BOTH_UIS = ("ComfyUI", "WebUI", "Forge", "diffusers"), ("ComfyUI", "WebUI")
EXACT_BY = {  # networks of this suite -> the programs that apply their files exactly, as docs/networks.md has it
    "lora": EVERYWHERE,
    "lora_fa": EVERYWHERE,
    "dylora": EVERYWHERE,
    "adalora": EVERYWHERE,
    "loha": IN_BOTH_UIS,
    "lokr": IN_BOTH_UIS,
    "dora": IN_BOTH_UIS,
    "oft": (),
    "oft names=lycoris": IN_BOTH_UIS,
    "ia3": (),  # that of CONTRIBUTING.md: the WebUI stops at its convolutions
}
EXACT_FOR_ONE_KIND = {("oft", "sdxl"): ("WebUI",)}


def as_if_trained(network: torch.nn.Module) -> None:
    """Random weights, and in AdaLoRA another number of ranks for each layer."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for index, adapter in enumerate(network.adapters()):
            if hasattr(adapter, "kept"):
                adapter.kept[1 + index % len(adapter.kept) :] = 0


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("case", EXACT_BY)
def test_our_own_networks_are_applied_exactly_where_the_docs_say(case, kind, models, file_of, tmp_path):
    algorithm, *words = case.split()
    module = importlib.import_module(f"networks.{algorithm}")
    given = dict(word.split("=") for word in words)
    arguments = everything(f"networks.{algorithm}", conv_dim="2", conv_alpha="3", **given)
    network = module.create_network(list(targets(models(kind), kind)), 2, 5, **arguments)
    as_if_trained(network)
    path = tmp_path / "network.safetensors"
    network.save_weights(path, torch.float32, METADATA[kind])
    exact = [found.name for found in verify(path, "files").consumers if found.verdict == "exact"]
    assert tuple(exact) == EXACT_FOR_ONE_KIND.get((case, kind), EXACT_BY[case])
    if "diffusers" in exact:
        layers = open_adapter(path, "files").layers
        for adapter in network.adapters():
            change = layers[adapter.name].delta(adapter.base.weight)
            torch.testing.assert_close(change, adapter.delta_weight().detach(), rtol=1e-4, atol=1e-5)
        assert error_in_diffusers(models(kind), kind, file_of(kind), path) < 1e-5
