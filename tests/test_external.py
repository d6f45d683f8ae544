"""Networks of other projects train, save, load and resume: LyCORIS, and any module with kohya's create_network."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.families.base import KohyaModels, ModelFamily
from library.families.sd import kohya_views, sd_adapter_targets
from library.network_choice import check_network_module
from library.options.groups import TrainNetworkOptions
from library.recipes.network import trained_parts
from library.recipes.network_building import build_network, check_arguments, load_algorithm
from library.training.sampling import draw
from networks.external import ExternalAlgorithm, ExternalNetwork
from tests import tiny
from tests.results import weights_equal
from tests.test_consumers import PROMPT, TOLERANCE, diffusers_pipeline, drawn_by
from tests.test_network_names import SD1, full_size, golden
from train_network import train

lycoris = pytest.importorskip("lycoris.kohya", reason="the package lycoris-lora is not installed")
ALGOS = ["lora", "locon", "loha", "lokr", "ia3", "dylora", "full", "diag-oft", "boft", "glora"]
RUNS = [*((algo, "sd1") for algo in ALGOS), ("lora", "sdxl"), ("loha", "sdxl")]
REFUSED = {  # by algorithm and --dim_from_weights: where LyCORIS fails, or says nothing and takes nothing
    ("dylora", False): "did not take the weights",
    ("dylora", True): "lycoris.kohya stopped at",
    ("ia3", True): "lycoris.kohya stopped at",
}
ADDED_BY_FULL = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")  # what kohya leaves alone
NAME = "lycoris.kohya"


@pytest.fixture(scope="module")
def file_of(tiny_file, tiny_sdxl_file) -> Callable[[str], Path]:
    """The toy model of a kind as a single file."""
    return {"sd1": tiny_file, "sdxl": tiny_sdxl_file}.get


@pytest.fixture
def build(file_of):
    """A family and a network on it; every call loads the model anew."""

    def make(
        arguments: dict[str, str] | None = None, kind: str = "sd1", **options: object
    ) -> tuple[ModelFamily, ExternalNetwork]:
        torch.manual_seed(0)
        values = {"network_dim": 4, "network_alpha": 2} | options
        read = TrainNetworkOptions(pretrained_model_name_or_path=str(file_of(kind)), **values)
        family = tiny.load_family(read)
        algorithm = load_algorithm(read.network_module or NAME)
        algorithm.check_arguments(arguments or {})
        return family, build_network(algorithm, family, read, arguments or {})

    return make


@torch.no_grad()
def answer(family: ModelFamily) -> Tensor:
    """What U-Net and text encoders say of a fixed input; DyLoRA draws its rank with `random`."""
    random.seed(0)
    torch.manual_seed(0)
    conds = family.prompt_conds("a cat", "")
    return family.predict(torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), conds)


def train_a_little(network: nn.Module, size: float = 0.03) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def arguments(tiny_file: Path, pictures: Path, output: Path, *network_args: str, **more: object) -> list[str]:
    short = dict(network_module=NAME, network_args=list(network_args) or None, max_train_epochs=None, max_train_steps=2)
    return tiny.arguments(tiny_file, pictures, output, **short | more)


def layers_of(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def kohyas_layers(family: ModelFamily) -> set[str]:
    return {target.name for target in family.adapter_targets(conv=True)}


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def whole_run(request, file_of, tmp_path_factory) -> tuple[str, str, list[str], Path]:
    """Algorithm, kind of model, command line and output folder of a run of two steps that keeps its states."""
    (algo, kind), folder = request.param, tmp_path_factory.mktemp("whole")
    pictures = tiny.write_pictures(folder / "train")
    more = {"scale_weight_norms": 0.01} if algo == "lokr" else {}  # which changes what is in no file of LoKr
    line = arguments(file_of(kind), pictures, folder / "out", f"algo={algo}", gradient_checkpointing=True, **more)
    train([*line, "--save_every_n_steps", "1", "--save_state"])
    return algo, kind, line, folder / "out"


def test_two_steps_train_and_the_file_has_kohyas_names(whole_run, build):
    algo, kind, _, output = whole_run
    path = output / "lora.safetensors"
    weights = load_file(path)
    family, network = build({"algo": algo}, kind, network_alpha=1)
    untrained = network._own_weights()
    assert weights.keys() == untrained.keys()
    added = {f"lora_unet_{name}" for name in ADDED_BY_FULL} if kind == "sd1" else set()
    assert layers_of(weights) == kohyas_layers(family) | added
    changed = layers_of(name for name in weights if not torch.equal(weights[name], untrained[name]))
    parts = {"lora_te"} if kind == "sd1" else {"lora_te1", "lora_te2"}
    assert {name.partition("_text_model_")[0] for name in changed if "_text_model_" in name} == parts
    assert len(changed) > 0.9 * len(layers_of(weights))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == NAME and metadata["ss_steps"] == "2" and metadata["sshs_model_hash"]


@pytest.mark.parametrize(("algo", "kind"), RUNS)
def test_a_new_network_changes_nothing_and_multiplier_zero_is_off(algo, kind, build, file_of):
    family, network = build({"algo": algo}, kind)
    before = answer(tiny.load_family(TrainNetworkOptions(pretrained_model_name_or_path=str(file_of(kind)))))
    torch.testing.assert_close(answer(family), before, rtol=1e-4, atol=1e-5)
    train_a_little(network)
    assert (answer(family) - before).norm() > 0.01 * before.norm()
    network.set_multiplier(0.0)
    torch.testing.assert_close(answer(family), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("algo", "kind"), RUNS)
def test_a_saved_network_answers_the_same_when_loaded(algo, kind, build, tmp_path):
    family, network = build({"algo": algo}, kind)
    train_a_little(network.eval())
    trained, path = answer(family), tmp_path / "网络 1.safetensors"
    network.save_weights(path, None, {"ss_epoch": "1"})
    assert network.check_saved(path) == len(layers_of(load_file(path)))
    for from_weights, given in ((False, {"algo": algo}), (True, {})):
        options = dict(network_weights=str(path), dim_from_weights=from_weights)
        if (algo, from_weights) in REFUSED:
            with pytest.raises(UserError, match=REFUSED[algo, from_weights]):
                build(given, kind, **options)
            continue
        again, loaded = build(given, kind, **options)
        loaded.eval()
        torch.testing.assert_close(answer(again), trained, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(whole_run, tmp_path):
    _, _, line, whole = whole_run
    train([*line, "--output_dir", str(tmp_path), "--resume", str(whole / "lora-step00000001-state")])
    assert weights_equal(whole / "lora.safetensors", tmp_path / "lora.safetensors")


def test_names_of_a_full_size_model_are_those_of_kohyas_networks():
    text_encoder, unet = kohya_views(*full_size(*SD1))
    options = TrainNetworkOptions(network_dim=1)
    network = ExternalAlgorithm(lycoris).network_on_models(KohyaModels(None, text_encoder, unet), options, {})
    added = {f"lora_unet_{name}" for name in ADDED_BY_FULL}
    assert layers_of(network.network.state_dict()) == layers_of(golden("sd15_conv")) | added


PRESET = """
enable_conv = false
unet_target_module = ["Transformer2DModel"]
unet_target_name = []
text_encoder_target_module = []

[module_algo_map.FeedForward]
algo = "lokr"
factor = 4
"""


def test_presets_choose_layers_and_are_gone_for_the_next_network(build, tmp_path):
    family, network = build({"preset": "attn-mlp"})
    transformers = {target.name for target in sd_adapter_targets(family.text_encoder, family.unet, conv=False)}
    assert layers_of(network.network.state_dict()) == transformers
    assert layers_of(build({"preset": "attn-only"})[1].network.state_dict()) == {
        name for name in transformers if "attn" in name
    }
    path = tmp_path / "预设 1.toml"
    path.write_text(PRESET, encoding="utf-8")
    weights = build({"preset": str(path), "algo": "loha"})[1].network.state_dict()
    assert layers_of(weights) == {name for name in transformers if name.startswith("lora_unet_")}
    assert all(("_ff_" in name) == ("lokr" in name) for name in weights if not name.endswith("alpha"))
    assert not any("lokr" in name for name in build()[1].network.state_dict())


def test_a_preset_that_names_no_layers_is_refused(build):
    with pytest.raises(UserError, match="no layers.*a preset that names none"):
        build({"algo": "ia3", "preset": "ia3"}, network_train_unet_only=True)


def test_learning_rates_and_parts_are_those_of_the_table(build):
    _, network = build({"loraplus_lr_ratio": "4"})
    groups = network.param_groups(1e-5, 1e-4)
    assert [group["name"] for group in groups] == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 4e-5, 1e-4, 4e-4])
    text, unet = trained_parts(network, groups)
    assert (text.num_modules, text.learning_rates, unet.learning_rates) == (18, [1e-5], [1e-4])
    total = sum(parameter.numel() for parameter in network.parameters())
    assert text.num_parameters + unet.num_parameters == total

    groups = network.param_groups(0.0, 1e-4)
    assert [group["name"] for group in groups] == ["unet", "unet plus"]
    trained = {name.split("_")[1] for name, p in network.network.named_parameters() if p.requires_grad}
    assert trained == {"unet"}
    assert trained_parts(network, groups)[0].learning_rates == []


def test_unet_only_leaves_the_text_encoder_out_of_the_file(tiny_file, pictures, tmp_path):
    train(arguments(tiny_file, pictures, tmp_path / "out", network_train_unet_only=True, save_precision="fp16"))
    weights = load_file(tmp_path / "out" / "lora.safetensors")
    assert {name.split("_")[1] for name in weights} == {"unet"}
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_limited_norms_are_logged_and_stay_over_a_save(build):
    _, network = build({"algo": "loha"})
    train_a_little(network)
    logged = network.limit_norms(0.001).logged()
    assert logged["max_norm/keys_scaled"] == 139 and logged["max_norm/max_key_norm"] == pytest.approx(0.001, rel=1e-3)
    assert network.limit_norms(0.0011).logged()["max_norm/keys_scaled"] == 0


@pytest.mark.parametrize("algo", ["dylora", "full", "glora", "ia3"])
def test_norms_that_lycoris_would_not_limit_are_refused(algo, build):
    with pytest.raises(UserError, match="--scale_weight_norms is not for this network of lycoris.kohya"):
        build({"algo": algo}, scale_weight_norms=1.0)


def test_another_alpha_in_a_file_is_refused(build, tmp_path):
    build()[1].save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match=r"alpha is 2 in .*a\.safetensors and 4 here; give --network_alpha"):
        build(network_alpha=4, network_weights=str(tmp_path / "a.safetensors"))


def test_arguments_that_a_file_answers_are_named(build, tmp_path, caplog):
    build()[1].save_weights(tmp_path / "a.safetensors", None, None)
    build({"conv_dim": "8"}, network_weights=str(tmp_path / "a.safetensors"), dim_from_weights=True)
    assert "network_args: conv_dim: no effect" in caplog.text


def test_a_file_of_another_algorithm_is_refused(build, tmp_path):
    build()[1].save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(UserError, match="a.safetensors has 278 weights that this network has not"):
        build({"algo": "loha"}, network_weights=str(tmp_path / "a.safetensors"))


@pytest.fixture
def restored_models() -> Iterator[None]:
    """diffusers' loader puts adapters into the shared toy models; take them out again."""
    yield
    tiny.forget_models()


def test_diffusers_draws_the_same_pictures_with_a_file_of_lycoris_lora(build, tmp_path, restored_models):
    arguments = {"algo": "lora", "preset": "attn-mlp"}
    family, network = build(arguments)
    train_a_little(network.eval(), 0.3)
    network.save_weights(tmp_path / "a.safetensors", None, {"ss_epoch": "1"})
    pipeline: StableDiffusionPipeline = diffusers_pipeline(family, "sd1")
    without = drawn_by(pipeline, PROMPT)
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    theirs, ours = drawn_by(pipeline, PROMPT), np.asarray(draw(family, PROMPT, "ddim"), dtype=int)
    assert abs(theirs - without).max() > 10 * TOLERANCE, "the network must be seen in the picture"
    assert abs(theirs - ours).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algo": "loa"}, "algo must be one of .*loha.*, got 'loa'"),
        ({"algo": "tlora"}, "got 'tlora'"),
        ({"preset": "ful"}, "preset must be one of full, .* or a TOML file, got 'ful'"),
    ],
)
def test_what_lycoris_has_not_is_refused_before_a_model_is_loaded(given, message):
    with pytest.raises(UserError, match=message):
        load_algorithm(NAME).check_arguments(given)


@pytest.mark.parametrize(
    ("rank", "given", "message"),
    [
        (6, {}, "--network_dim must be a multiple of 4 with algo=dylora, .*, got 6"),
        (8, {"conv_dim": "2"}, "network_args: conv_dim must be a multiple of 4 .* got 2"),
        (8, {"block_size": "3"}, "--network_dim must be a multiple of 3 .* got 8"),
        (8, {"block_size": "0"}, "block_size above 0"),
    ],
)
def test_ranks_that_dylora_cannot_divide_are_refused_before_a_model_is_loaded(rank, given, message):
    algorithm, arguments = load_algorithm(NAME), {"algo": "DyLoRA"} | given
    check_arguments(algorithm, TrainNetworkOptions(network_dim=12), {"algo": "dylora", "block_size": "6"})
    check_arguments(algorithm, TrainNetworkOptions(network_dim=6), {"algo": "lora"})
    with pytest.raises(UserError, match=message):
        check_arguments(algorithm, TrainNetworkOptions(network_dim=rank), arguments)


def test_a_broken_preset_file_is_named(tmp_path):
    (tmp_path / "a.toml").write_text("unet_target_modul = []", encoding="utf-8")
    with pytest.raises(UserError, match=r"preset: .*a\.toml is no preset file"):
        load_algorithm(NAME).check_arguments({"preset": str(tmp_path / "a.toml")})


def test_arguments_that_lycoris_ignores_are_named_and_the_others_are_not(caplog):
    known = {"algo": "lokr", "factor": "8", "conv_dim": "4", "use_tucker": "True", "constrain": "1", "dora_wd": "False"}
    load_algorithm(NAME).check_arguments(known)
    assert not caplog.text
    load_algorithm(NAME).check_arguments(known | {"conv_dimm": "4"})
    assert "lycoris.kohya seems not to read conv_dimm; did you mean conv_dim?" in caplog.text


@pytest.mark.parametrize("given", [{"algo": "glora"}, {"algo": "ia3"}, {"dora_wd": "True"}])
def test_files_that_programs_read_otherwise_are_told_of(given, caplog):
    load_algorithm(NAME).check_arguments(given)
    assert "files of" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lycoris.kohyaa", "there is no module lycoris.kohyaa; did you mean lycoris.kohya?"),
        ("nonsense.kohya", "needs the package nonsense, which is not installed"),
        ("networks.lorra", "there is no network networks.lorra here; there is networks."),
        ("networks.base", "there is no network networks.base here"),
    ],
)
def test_a_module_that_is_not_there_is_named(name, message):
    (problem,) = check_network_module(name)
    assert message in problem


def test_the_modules_that_are_there_are_taken():
    assert [problem for name in (None, "networks.lora", NAME) for problem in check_network_module(name)] == []


def test_a_package_that_is_installed_under_another_name_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert check_network_module(NAME) == [
        "--network_module lycoris.kohya needs the package lycoris, which is not installed: pip install lycoris-lora"
    ]


STRANGERS = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self, layer, strength):
        super().__init__()
        self.gate = nn.Parameter(torch.full((layer.out_features,), strength))
        self.layer, self.base = [layer], layer.forward

    def forward(self, x):
        return self.base(x) * (1 + self.gate)


class Network(nn.Module):
    def __init__(self, text_encoder, unet, strength):
        super().__init__()
        self.roots, self.strength = {"lora_te": text_encoder, "lora_unet": unet}, strength
        self.epochs = 0

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for (prefix, root), wanted in zip(self.roots.items(), (apply_text_encoder, apply_unet)):
            for path, attention in root.named_modules() if wanted else ():
                if type(attention).__name__ in ("CrossAttention", "CLIPAttention"):
                    name = "to_q" if prefix == "lora_unet" else "q_proj"
                    layer = getattr(attention, name)
                    gate = Gate(layer, self.strength)
                    layer.forward = gate.forward
                    self.add_module(f"{prefix}_{path}_{name}".replace(".", "_"), gate)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        groups = []
        for prefix, lr in (("lora_te", text_encoder_lr), ("lora_unet", unet_lr)):
            groups.append({"params": [p for n, p in self.named_parameters() if n.startswith(prefix)], "lr": lr})
        return groups

    def on_epoch_start(self, text_encoder, unet):
        self.epochs += 1

    def save_weights(self, file, dtype, metadata):
        from safetensors.torch import save_file
        save_file(self.state_dict(), file, {**metadata, "gates": "per output"})

    def load_weights(self, file):
        from safetensors.torch import load_file
        self.load_state_dict(load_file(file))


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None,
                   strength="0", dropout=None):
    assert vae.config.latent_channels == 4
    return Network(text_encoder, unet, float(strength))
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Iterator[str]:
    """The name of a module as a user may write one."""
    (tmp_path / "strangers_gates.py").write_text(STRANGERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "strangers_gates"
    sys.modules.pop("strangers_gates", None)


def test_a_module_that_somebody_wrote_trains_and_goes_on_from_its_file(stranger, tiny_file, pictures, tmp_path, capsys):
    train(arguments(tiny_file, pictures, tmp_path / "out", network_module=stranger, text_encoder_lr=1e-4))
    path = tmp_path / "out" / "lora.safetensors"
    first = load_file(path)
    assert layers_of(first) == {name for name in layers_of(first) if name.endswith(("_to_q", "_self_attn_q_proj"))}
    assert all(value.any() for value in first.values())
    assert "0.0001" in (table := capsys.readouterr().out) and "0.001" in table
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["gates"] == "per output" and metadata["ss_network_module"] == stranger
    more = dict(network_module=stranger, network_weights=path, learning_rate=1e-30)
    train(arguments(tiny_file, pictures, tmp_path / "more", "strength=0.5", optimizer_args=["weight_decay=0"], **more))
    again = load_file(tmp_path / "more" / "lora.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_groups_that_a_module_does_not_name_are_named_by_their_part(stranger, build):
    _, network = build(network_module=stranger)
    assert [(g["name"], g["lr"]) for g in network.param_groups(1e-5, 1e-4)] == [("textencoder", 1e-5), ("unet", 1e-4)]
    assert [group["name"] for group in network.param_groups(0.0, 1e-4)] == ["unet"]
    network.train()
    assert network.network.training and network.network.epochs == 1
    with pytest.raises(UserError, match="Network has no set_multiplier"):
        network.set_multiplier(0.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(arguments={"strenght": "1"}), "strangers_gates has no argument strenght; did you mean strength?"),
        (dict(arguments={"strength": "high"}), "strangers_gates stopped at --network_args or a file: ValueError"),
        (dict(scale_weight_norms=1.0), "--scale_weight_norms is not for this network of strangers_gates"),
        (dict(dim_from_weights=True, network_weights="a"), "--dim_from_weights is not for"),
    ],
)
def test_what_a_module_cannot_do_is_told(more, message, stranger, build):
    with pytest.raises(UserError, match=message):
        build(network_module=stranger, **more)


def test_a_file_with_weights_for_no_layer_is_told_of(build, tmp_path, caplog):
    _, network = build()
    save_file(
        {"lora_unet_nowhere.diff": torch.ones(2), "lora_unet_conv_in.diff": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    assert network.check_saved(tmp_path / "a.safetensors") == 1
    assert "has weights for no layer of the model: lora_unet_nowhere" in caplog.text
