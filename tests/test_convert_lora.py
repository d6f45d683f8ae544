"""Files under other names are read by the programs that have them, do the same there, and come back bit for bit."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from library.adapters.file import open_adapter
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from networks.convert_lora import main
from tests import tiny
from tests.adapter_files import targets, weights_of
from tests.test_consumers import diffusers_pipeline
from tests.test_verify_lora import error_in_diffusers, file_of, models, with_odd_alphas, written  # noqa: F401

KINDS = ("sd1", "sdxl")


def same(one, other) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


@pytest.fixture
def uneven(models, tmp_path):  # noqa: F811
    """A LoRA file of a kind, with another alpha in some layers, as whole numbers in others, and in half precision."""

    def make(kind: str, algorithm: str = "lora"):
        weights = weights_of(models(kind), kind, algorithm)
        weights = with_odd_alphas(weights, ".*(attn1_to_q|fc1)") if "lora" in algorithm else weights
        weights |= {key: torch.tensor(3) for key in weights if key.endswith("proj_in.alpha")}
        halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        return written(tmp_path / "文 件.safetensors", kind, halves)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["diffusers", "peft", "kohya_diffusers"])
def test_there_and_back_is_bit_exact(to, kind, uneven, tmp_path):
    for algorithm in ("lora", "dora"):
        source, there, back = uneven(kind, algorithm), tmp_path / f"{algorithm} {to}", tmp_path / "back.safetensors"
        there = there if to == "peft" else there.with_suffix(".safetensors")
        main([str(source), str(there), "--to", to])
        main([str(there), str(back), "--to", "kohya", "--overwrite"])
        assert same(source, back)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_takes_what_was_converted_and_does_the_same(kind, uneven, models, file_of, tmp_path):  # noqa: F811
    source = uneven(kind)
    main([str(source), str(tmp_path / "d.safetensors"), "--to", "diffusers"])
    kohyas = open_adapter(source, "")
    wanted = {target.name: kohyas.layers[target.name].delta() for target in targets(models(kind), kind)}
    found = [
        (target.name, target.layer, target.layer.weight.detach().clone()) for target in targets(models(kind), kind)
    ]
    family = tiny.load_family(TrainNetworkOptions(pretrained_model_name_or_path=str(file_of(kind))))
    pipeline = diffusers_pipeline(family, kind)
    pipeline.load_lora_weights(str(tmp_path / "d.safetensors"))
    pipeline.fuse_lora()
    for name, layer, weight in found:
        change = wanted[name].reshape(weight.shape)
        assert (layer.weight - weight - change).norm() < 1e-4 * change.norm(), name


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_takes_what_was_converted_and_does_the_same(kind, algorithm, uneven, models, tmp_path):  # noqa: F811
    source = uneven(kind, algorithm)
    main([str(source), str(tmp_path / "peft"), "--to", "peft"])
    layers = open_adapter(source, "").layers
    before = [
        (target.name, target.layer, target.layer.weight.detach().clone()) for target in targets(models(kind), kind)
    ]
    built = models(kind)
    folders = dict(zip(("text_encoder", "text_encoder_2"), built.text_encoders, strict=False)) | {"unet": built.unet}
    for folder, model in folders.items():
        PeftModel.from_pretrained(model, tmp_path / "peft" / folder).merge_and_unload()
    now = {target.name: target.layer.weight for target in targets(models(kind), kind)}
    for name, _, weight in before:
        change = layers[name].delta(weight)
        assert (now[name] - weight - change).norm() < 1e-3 * change.norm(), name


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [("loha", "layers with loha"), ("locon, tucker", "with lora_mid"), ("dora, inputs", "DoRA with norms of inputs")],
)
def test_what_has_no_name_there_is_a_sentence_and_keeps_its_own_names(algorithm, message, models, tmp_path):  # noqa: F811
    source = written(tmp_path / "a.safetensors", "sdxl", weights_of(models("sdxl"), "sdxl", algorithm))
    for to in ("diffusers", "peft"):
        with pytest.raises(UserError, match=message):
            main([str(source), str(tmp_path / ("b" if to == "peft" else "b.safetensors")), "--to", to])
    main([str(source), str(tmp_path / "b.safetensors"), "--to", "kohya_diffusers"])
    main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), "--to", "kohya"])
    assert same(source, tmp_path / "c.safetensors") and not (tmp_path / "b").exists()
    assert any("down_blocks" in key for key in load_file(tmp_path / "b.safetensors"))
