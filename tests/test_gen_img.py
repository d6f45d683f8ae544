"""Pictures from prompts: the same as training's previews, with kohya's prompt lines, names and texts."""

import importlib
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img
from library.errors import UserError
from library.families.base import AdapterTarget
from library.generating.drawing import Artist, batches_of
from library.generating.dynamic_prompts import Wildcards, variants_of
from library.generating.options import DrawOptions
from library.generating.preparation import module_of
from library.generating.requests import PictureRequest, Requests, parse_line, prompt_lines, usual_request
from library.options.groups import ModelOptions
from networks import lora, merge_lora
from tests import tiny
from tests.algorithms import SHOWN
from train_network import train

ROOT = Path(__file__).parents[1]
DDIM = "a cat --n (blurry:1.2) --w 64 --h 64 --s 3 --l 4 --d 7"
EULER_A = "a dog, 狗 --w 64 --h 128 --s 3 --d 8 --ss euler_a"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def draw(model: Path, out: Path, *words: object) -> list[Path]:
    before = set(out.glob("*.png"))
    gen_img.main(["--ckpt", str(model), "--outdir", str(out), *map(str, words)])
    return sorted(set(out.glob("*.png")) - before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_file) -> Path:
    """The folder of a short run with previews."""
    folder = tmp_path_factory.mktemp("run")
    more = {"sample_prompts": f"{DDIM}\n{EULER_A}", "sample_every_n_epochs": 1, "learning_rate": 0.01}
    train(tiny.arguments(tiny_file, tiny.write_pictures(folder / "train"), folder / "out", **more))
    return folder / "out"


@pytest.mark.parametrize(("number", "line"), list(enumerate([DDIM, EULER_A])))
def test_a_picture_is_the_preview_of_training_to_the_bit(number, line, trained, tiny_file, tmp_path):
    (path,) = draw(tiny_file, tmp_path, "--network_weights", trained / "lora.safetensors", "--prompt", line)
    (plain,) = draw(tiny_file, tmp_path, "--prompt", line)
    (preview,) = (trained / "sample").glob(f"lora_e000001_{number:02d}_*.png")
    assert np.array_equal(pixels(path), pixels(preview))
    assert not np.array_equal(pixels(path), pixels(plain))


def test_networks_add_up_and_may_be_merged(trained, tiny_file, tmp_path):
    lora = trained / "lora.safetensors"
    line = "a cat --w 64 --h 64 --s 1 --l 1 --d 7"  # random models make large differences of small ones
    network = ["--network_weights", lora, lora, "--network_mul", 0.75, 0.25, "--prompt", line]
    (both,) = draw(tiny_file, tmp_path, *network)
    (merged,) = draw(tiny_file, tmp_path, *network, "--network_merge")
    (one_merged,) = draw(tiny_file, tmp_path, *network, "--network_merge_n_models", 1)
    (of_line,) = draw(tiny_file, tmp_path, *network[:-1], f"{line} --am 0.5,0.5")
    (whole,) = draw(tiny_file, tmp_path, *network[:2], "--prompt", line)
    differences = [
        np.abs(pixels(path).astype(int) - pixels(whole)).max() for path in (both, merged, one_merged, of_line)
    ]
    assert max(differences) <= 1, differences


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("lora", "networks.lora"), ("dora", "networks.lora"), ("adalora", "networks.lora"), ("loha", "networks.loha"),
     ("lokr", "networks.lokr"), ("oft", "networks.oft"), (SHOWN.partition(".")[2], SHOWN)],
)  # fmt: skip
def test_a_file_tells_its_algorithm(algorithm, expected, tmp_path):
    targets = [
        AdapterTarget("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", torch.nn.Linear(8, 8), "unet")
    ]
    module = importlib.import_module(f"networks.{algorithm}")
    metadata = {"ss_network_module": f"networks.{algorithm}"}  # which counts where keys do not tell
    module.create_network(targets, 2, 2).save_weights(tmp_path / "a.safetensors", None, metadata)
    assert module_of(tmp_path / "a.safetensors") == expected


def test_a_checkpoint_with_the_network_merged_draws_what_the_network_draws(tmp_path):
    """On the embedded base, whose pictures show something."""
    base, file, merged = ROOT / "assets/demo_base", tmp_path / "lora.safetensors", tmp_path / "merged 模型"
    torch.manual_seed(0)
    family = tiny.load_family(ModelOptions(pretrained_model_name_or_path=str(base)))
    network = lora.create_network(list(family.adapter_targets(conv=True)), 4, 4, conv_dim="2")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    network.save_weights(file, None, None)
    merge_lora.main(["--sd_model", str(base), "--models", str(file), "--ratios", "0.75", "--save_to", str(merged)])
    line = "a red heart on a white background --w 128 --h 128 --s 4 --d 7"
    (applied,) = draw(base, tmp_path, "--network_weights", file, "--network_mul", 0.75, "--prompt", line)
    (of_merged,) = draw(merged, tmp_path, "--prompt", line)
    (plain,) = draw(base, tmp_path, "--prompt", line)
    to_merged, to_plain = (np.abs(pixels(applied).astype(int) - pixels(path)) for path in (of_merged, plain))
    assert to_merged.max() <= 1
    assert to_plain.mean() > 2


def test_names_and_texts_are_kohyas(tiny_file, tmp_path):
    flags = ["--W", 64, "--H", 64, "--steps", 2, "--images_per_prompt", 2, "--prompt", "一只猫 --d 5,6 --n dark"]
    first, second = draw(tiny_file, tmp_path, *flags)
    assert re.fullmatch(r"im_\d{14}_001_5\.png", first.name) and re.fullmatch(r"im_\d{14}_002_6\.png", second.name)
    assert Image.open(second).text == {
        "prompt": "一只猫",
        "seed": "6",
        "sampler": "ddim",
        "steps": "2",
        "scale": "7.5",
        "negative-prompt": "dark",
        "raw-prompt": "一只猫 --d 5,6 --n dark",
    }
    for expected in ("im_000001.png", "im_000002.png"):
        (path,) = draw(tiny_file, tmp_path, *flags[:6], "--sequential_file_name", "--prompt", "a cat")
        assert path.name == expected
    named = [draw(tiny_file, tmp_path, *flags[:6], "--prompt", "a --f 猫")[0].name for _ in range(2)]
    assert named == ["猫.png", "猫_2.png"]


def test_sdxl_sizes_count_and_are_in_the_texts(tiny_sdxl_file, tmp_path):
    flags = ["--W", 64, "--H", 64, "--steps", 2, "--seed", 1, "--prompt"]
    (plain,) = draw(tiny_sdxl_file, tmp_path, *flags, "a")
    (same,) = draw(tiny_sdxl_file, tmp_path, *flags, "a --ow 64 --oh 64")
    (other,) = draw(tiny_sdxl_file, tmp_path, *flags, "a --ow 900 --ct 20")
    assert np.array_equal(pixels(plain), pixels(same)) and not np.array_equal(pixels(plain), pixels(other))
    assert [Image.open(other).text[f"original-{name}"] for name in ("width", "height")] == ["900", "64"]
    assert Image.open(other).text["crop-top"] == "20"


def request(prompt: str = "a cat", **more: object) -> PictureRequest:
    return PictureRequest(prompt, width=64, height=64, sample_steps=4, seed=3, **more)


@pytest.fixture(scope="module")
def artist(tiny_file) -> Artist:
    return Artist(tiny.load_family(ModelOptions(pretrained_model_name_or_path=str(tiny_file))), "ddim")


def test_a_batch_draws_what_single_pictures_are(artist):
    long = "word " * 80
    requests = [request(), request(long, negative_prompt="b"), PictureRequest("c", width=64, height=128, seed=3)]
    batches = list(batches_of(requests, 4))
    assert [len(batch) for batch in batches] == [2, 1]
    for one, single in zip(artist.draw(batches[0]), requests, strict=False):
        alone = np.asarray(artist.draw([single])[0].picture).astype(int)
        if single.prompt == long:  # the other is padded to the passes of this one
            assert np.abs(np.asarray(one.picture) - alone).max() <= 2


def test_negative_scale_of_the_scale_less_one_is_plain_guidance_where_the_negative_prompt_is_empty(artist):
    """empty + s (positive - empty) - n (empty - empty) is guidance away from the empty prompt."""
    plain, scaled = (np.asarray(artist.draw([request(negative_scale=n)])[0].picture).astype(int) for n in (None, 3.0))
    assert np.abs(plain - scaled).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "dpm_2", "dpmsolver++", "pndm", "lms"])
def test_a_picture_to_begin_with_stays_as_far_as_the_strength_says(sampler, tmp_path):
    options = ModelOptions(pretrained_model_name_or_path="assets/demo_base")  # one that has learned to draw
    artist = Artist(tiny.load_family(options), "ddim")
    picture = artist.draw([request("a red heart")])[0].picture
    path = tmp_path / "b 图.png"
    picture.save(path)
    again = {
        strength: artist.draw(
            [request("a green tree", image_path=str(path), strength=strength, sample_sampler=sampler, scale=1.0)]
        )[0]
        for strength in (0.0, 0.3, 1.0)
    }
    start = artist._encoded([picture])
    with torch.no_grad():
        decoded = artist._decoded(request(), start)
    assert np.array_equal(np.asarray(again[0.0].picture), np.asarray(decoded))
    near, far = (np.abs(np.asarray(again[s].picture).astype(int) - np.asarray(decoded)).mean() for s in (0.3, 1.0))
    assert 0 < near < far


@pytest.mark.parametrize("in_latents", [False, True])
def test_highres_fix_draws_small_first(in_latents, tiny_file, tmp_path):
    flags = ["--W", 128, "--H", 64, "--steps", 2, "--seed", 4, "--highres_fix_scale", 0.5, "--highres_fix_steps", 3]
    flags += ["--highres_fix_strength", 0.5, "--highres_fix_save_1st"]
    flags += ["--highres_fix_latents_upscaling"] * in_latents
    small, large = draw(tiny_file, tmp_path, *flags, "--prompt", "a cat")
    assert [Image.open(path).size for path in (small, large)] == [(64, 64), (128, 64)]
    assert [path.name[-8:-6] for path in (small, large)] == ["_0", "_1"] or [
        re.search(r"_(\d)001_4", path.name)[1] for path in (small, large)
    ] == ["0", "1"]


def drawn_variants(text: str, count: int = 1, folder: Path | None = None) -> list[str]:
    return variants_of(text, count, random.Random(0), Wildcards(folder and str(folder)))


def test_choices_in_prompts(tmp_path):
    assert {*drawn_variants("a {red|green} {cat|}", 50)} == {"a red cat", "a red ", "a green cat", "a green "}
    assert drawn_variants("{e$$a|b} {e$$c|d}") == ["a c", "a d", "b c", "b d"]
    assert {*drawn_variants("{2$$ and $$a|b}", 30)} == {"a and b", "b and a"}
    assert {len(text.split(", ")) for text in drawn_variants("{1-3$$a|b|c}", 60)} == {1, 2, 3}
    assert {*drawn_variants("{a {b|c}|d}", 60)} == {"a b", "a c", "d"}
    (tmp_path / "颜色.txt").write_text("# colours\nred\n{blue|green}\n", encoding="utf-8")
    assert {*drawn_variants("a __颜色__ cat", 60, tmp_path)} == {"a red cat", "a blue cat", "a green cat"}


def requests_of(*argv: str) -> list[PictureRequest]:
    from library.options.cli import read_options

    options = read_options(DrawOptions, ["--ckpt", "x", *argv])
    return Requests(options, usual_request(options, (512, 512)), 2).of_rounds(prompt_lines(options))


def test_seeds_are_given_drawn_from_one_or_shared():
    seeds = lambda *argv: [request.seed for request in requests_of("--prompt", "a", *argv)]  # noqa: E731
    assert seeds("--seed", "5") == [5]
    several = seeds("--seed", "5", "--images_per_prompt", "3")
    assert several == seeds("--seed", "5", "--images_per_prompt", "3") and len({*several}) == 3
    shared = seeds("--seed", "5", "--images_per_prompt", "2", "--n_iter", "2", "--iter_same_seed")
    assert shared[:2] == [5, 5] and shared[2] == shared[3] != 5


def test_a_line_goes_before_the_flags(tmp_path):
    path = tmp_path / "提示.txt"
    line = "a {x|x} --w {100|100} --l 2 --nl none --t 0.5 --am 0.5,-1 --d 3 --N (bad:1.2)"
    path.write_text(f"# no\n\n{line}\n", encoding="utf-8")
    (found,) = requests_of("--from_file", str(path), "--W", "256", "--scale", "4", "--negative_scale", "2")
    assert (found.prompt, found.width, found.height, found.scale, found.seed) == ("a x", 96, 512, 2.0, 3)
    assert (found.negative_scale, found.strength, found.network_mul) == (None, 0.5, (0.5, -1.0))
    assert (found.negative_prompt, found.raw_prompt) == ("(bad:1.2)", line)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "a --q 1"], "--prompt: there is no option --q"),
        (["--prompt", "a --am 1,2,3"], "--am has 3 multipliers for 0 networks"),
        (["--prompt", "a --ss eular"], "there is no sampler eular"),
        (["--prompt", "a --dsd1 3"], "--dsd1 belongs to a feature that is not in this suite"),
        (["--prompt", "a --f x/y"], "--f must be a name without folders"),
        (["--prompt", "{x$$a|b}"], "it takes a number, a range such as 1-2, or e"),
        (["--prompt", "a", "--control_net_models", "c.safetensors"], "--control_net_models is not supported"),
        (["--prompt", "a", "--network_weights", "gone.safetensors"], "--network_weights: there is no file"),
        (["--prompt", "a", "--sdxl"], "--sdxl does not go with"),
        (["--prompt", "a", "--highres_fix_strength", "0.5"], "--highres_fix_strength needs --highres_fix_scale"),
        ([], "one of --prompt, --from_file and --interactive says what to draw, got none"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(words, sentence, tiny_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "library.generating.session", None)
    with pytest.raises(UserError) as caught:
        draw(tiny_file, tmp_path / "out", *words)
    assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompts_are_asked_for_and_a_mistake_is_no_end(tiny_file, tmp_path, monkeypatch, capsys):
    typed = iter(["a cat --d 1", "a --q 1", "a dog --d 2", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    paths = draw(tiny_file, tmp_path, "--interactive", "--W", 64, "--H", 64, "--steps", 1)
    assert [path.stem[-1] for path in paths] == ["1", "2"]
    assert "there is no option --q" in capsys.readouterr().err


def test_line_options_may_be_capital():
    assert parse_line("a --W 64 --Am 1", "x") == ("a", {"width": 64, "network_mul": (1.0,)})
