"""What is told of the numbers in a file is true of them."""

import pytest
import torch

from library.adapters.file import open_adapter
from library.adapters.interrogation import effects_of_tokens
from library.adapters.weight_facts import facts_of
from library.errors import EXIT_FINDINGS, UserError
from library.families import clip
from library.options.groups import ModelOptions, TrainNetworkOptions
from networks import check_lora_weights, lora_interrogator
from tests import tiny
from tests.adapter_files import weights_of
from tests.test_verify_lora import file_of, models, written  # noqa: F401


@pytest.mark.parametrize("algorithm", ["lora", "locon, tucker", "loha", "lokr", "full"])
def test_norms_are_those_of_the_changes(algorithm, models, tmp_path):  # noqa: F811
    path = written(tmp_path / "a.safetensors", "sd1", weights_of(models("sd1"), "sd1", algorithm))
    file = open_adapter(path, "file")
    for fact in facts_of(file):
        assert fact.norm == pytest.approx(file.layers[fact.name].delta().norm().item(), rel=1e-4)
        assert not fact.is_empty and not fact.is_broken


def test_empty_and_broken_layers_are_named(models, tmp_path, capsys):  # noqa: F811
    weights = weights_of(models("sdxl"), "sdxl", "lora")
    check_lora_weights.main([str(written(tmp_path / "a.safetensors", "sdxl", weights))])
    told = capsys.readouterr().out
    assert {"text encoder 1", "text encoder 2"} <= {line[:24].strip() for line in told.splitlines()}
    assert "U-Net input_blocks_4" in told and "rank 4, alpha 2" in told
    ups = [key for key in weights if key.endswith("up.weight")]
    weights |= {ups[0]: torch.zeros_like(weights[ups[0]]), ups[1]: torch.full_like(weights[ups[1]], torch.nan)}
    with pytest.raises(SystemExit) as ended:
        check_lora_weights.main([str(written(tmp_path / "b.safetensors", "sdxl", weights)), "-s"])
    told = capsys.readouterr().out
    assert ended.value.code == EXIT_FINDINGS
    assert f"1 are empty, and change nothing: {ups[0].partition('.')[0]}" in told
    assert f"1 hold numbers that are none (training diverged): {ups[1].partition('.')[0]}" in told
    assert f"{ups[0]}, 32x4, 0, 0, 0" in told


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_tokens_that_change_most_are_those_of_the_whole_model(kind, models, file_of, tmp_path, capsys):  # noqa: F811
    """Three tokens alone give what 77 give, with the network attached to a model of its own."""
    weights = weights_of(models(kind), kind, "loha", lambda target: target.part != "unet")
    path = written(tmp_path / "a.safetensors", kind, weights)
    checkpoint = str(file_of(kind))
    lora_interrogator.main(["--sd_model", checkpoint, "--model", str(path), "--batch_size", "4096"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == lora_interrogator.NUM_SHOWN
    family = tiny.load_family(TrainNetworkOptions(pretrained_model_name_or_path=checkpoint))
    first, last = ((int(line.split()[1]), float(line.split()[0])) for line in (lines[0], lines[-1]))
    ids = torch.full((2, 1, 77), 49407)
    ids[:, 0, 0], ids[0, 0, 1], ids[1, 0, 1] = 49406, first[0], last[0]
    hidden = [encoded(family, ids)]
    for target in family.adapter_targets(conv=False):
        if target.part != "unet":
            target.layer.weight.data += open_adapter(path, "").layers[target.name].delta(target.layer.weight)
    hidden.append(encoded(family, ids))
    changes = (hidden[1] - hidden[0])[:, 1:3].abs().mean(dim=(1, 2)).tolist()
    assert changes == pytest.approx([first[1], last[1]], rel=1e-3) and changes[0] > changes[1]


@torch.no_grad()
def encoded(family, ids):
    if len(family.text_encoders) == 1:
        return clip.encode(family.text_encoders[0], ids, None)
    return torch.cat([clip.encode_penultimate(encoder, ids)[0] for encoder in family.text_encoders], dim=-1)


def test_a_network_of_the_unet_alone_has_no_words(models, file_of, tmp_path):  # noqa: F811
    weights = weights_of(models("sd1"), "sd1", "lora", lambda target: target.part == "unet")
    path = written(tmp_path / "a.safetensors", "sd1", weights)
    with pytest.raises(UserError, match="changes nothing in the text encoder"):
        effects_of_tokens(ModelOptions(pretrained_model_name_or_path=str(file_of("sd1"))), path, 16)
