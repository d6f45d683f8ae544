"""--dry_run measures a real step of the largest batch, and writes nothing."""

import re

import pytest
from PIL import Image

from library.preflight import preflight
from library.recipes.dry_run import duration, largest_batch
from library.recipes.memory_table import GIB, estimate
from library.recipes.network import build_datasets
from tests import tiny
from tests.test_memory_table import options_for
from train_network import train


def columns(text: str) -> dict[str, str]:
    """First and second cell of each line."""
    return {cells[0]: cells[1] for line in text.splitlines() if len(cells := re.split(r"\s{2,}", line.strip())) > 1}


def test_a_step_is_measured_and_nothing_is_written(model_file, pictures, tmp_path, capsys):
    """The run takes some savers already, so that fewer are estimated."""
    before = sorted(pictures.rglob("*"))
    train(
        tiny.arguments(
            model_file, pictures, tmp_path / "out", dry_run=True, cache_latents_to_disk=True, train_batch_size=2,
            gradient_accumulation_steps=3, logging_dir=tmp_path / "logs", mixed_precision="bf16", full_bf16=True,
            optimizer_type="AdamW8bit", network_train_unet_only=True,
        )
    )  # fmt: skip
    said = columns(capsys.readouterr().out)
    assert said["batch"] == "2 pictures of 128x64" or said["batch"] == "2 pictures of 64x128"
    for name in ("loading the model", "the first step", "a step after it"):
        assert float(said[name].removesuffix(" s")) >= 0
    assert re.fullmatch(r"\d\.\d\d GiB of .* GiB", said["peak memory"])
    assert {"as it is", "--gradient_checkpointing", "all of these"} <= said.keys()
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()
    assert [path for path in sorted(pictures.rglob("*")) if path.name != ".athanor_index"] == before


def test_the_largest_batch_is_the_one_with_most_pixels(tiny_file, tmp_path):
    tiny.write_pictures(tmp_path / "train", count=8)
    Image.new("RGB", (256, 256)).save(tmp_path / "train" / "2_cat" / "large.png")
    options = options_for(
        tiny_file, tmp_path / "train", tmp_path / "out",
        resolution="256,256", max_bucket_reso=256, bucket_no_upscale=True, train_batch_size=4,
    )  # fmt: skip
    checked = preflight(options)
    batch = largest_batch(build_datasets(options, checked, 1)[0])
    assert batch.target_sizes_hw.tolist() == 2 * [[256, 256]]  # more than four of 128x64


def test_the_estimate_is_of_the_batch_that_was_measured_and_folders_are_left_alone(
    tiny_file, pictures, tmp_path, capsys
):
    """The batch size of a dataset's own file counts, not that of the flag beside it."""
    config = tmp_path / "datasets.toml"
    config.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{(pictures / '2_cat').as_posix()}'\nnum_repeats = 2\ncache_info = true\n",
        encoding="utf-8",
    )
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", dry_run=True, dataset_config=config))
    said = capsys.readouterr().out
    width, height = map(int, re.search(r"batch +2 pictures of (\d+)x(\d+)", said).groups())
    options = options_for(tiny_file, pictures, tmp_path / "out", train_batch_size=2)
    wanted = estimate(options, "sd", (width, height), captions_change=False)
    found = next(line for line in said.splitlines() if line.startswith("as it is")).split()[3:]
    assert found[2:] == [f"{value / GIB:.2f}" for value in (wanted.step, wanted.before, wanted.total, 0)]
    assert not list(pictures.rglob("metadata_cache.json"))


def test_a_third_partys_network_is_measured_and_not_estimated(tiny_file, pictures, tmp_path, capsys):
    pytest.importorskip("lycoris")
    arguments = {
        "network_module": "lycoris.kohya",
        "network_args": ["algo=locon"],
        "optimizer_type": "AdamWScheduleFree",
    }
    train(tiny.arguments(tiny_file, pictures, tmp_path / "out", dry_run=True, **arguments))
    said = capsys.readouterr().out
    assert "peak memory" in said and "estimated for networks.* alone" in said and "as it is" not in said


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (12_345, "3 h 26 min")]
)
def test_durations_are_told_as_people_tell_them(seconds, text):
    assert duration(seconds) == text
