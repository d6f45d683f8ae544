"""Class pictures that the embedded base draws: numbered, seeded, gone on with, and read by training."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from library.dataset.scan import scan_dataset
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from tools.make_regularization_images import main

BASE = Path(__file__).parents[1] / "assets" / "demo_base"
PICTURES = Path(__file__).parents[1] / "assets" / "demo_pictures" / "train"


def words(folder: Path, count: int, *more: str) -> list[str]:
    given = dict(pretrained_model_name_or_path=BASE, output_dir=folder, resolution="64", sample_steps=3, seed=7)
    shared = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*shared, "--num_images", str(count), *more]


def test_pictures_are_drawn_once_and_each_has_its_own_seed(tmp_path, capsys):
    folder = tmp_path / "正则 reg"
    main(words(folder, 2, "--class_tokens", "red circle", "猫", "--prompt", "{class}, flat", "--negative_prompt", "x"))
    drawn = sorted(folder.rglob("*.png"))
    names = ["1_red circle/000001.png", "1_red circle/000002.png", "1_猫/000001.png", "1_猫/000002.png"]
    assert [path.relative_to(folder).as_posix() for path in drawn] == names
    with Image.open(drawn[1]) as image:
        assert image.size == (64, 64)
        assert image.text["parameters"] == (
            "red circle, flat\nNegative prompt: x\n"
            "Steps: 3, Sampler: ddim, CFG scale: 7.5, Seed: 8, Size: 64x64, Model: demo_base"
        )
    first = [path.read_bytes() for path in drawn]
    assert len(set(first)) == 4
    drawn[0].unlink()
    main(words(folder, 2, "--class_tokens", "red circle", "猫", "--prompt", "{class}, flat", "--negative_prompt", "x"))
    assert [path.read_bytes() for path in drawn] == first
    assert "1_red circle: 1 picture there already" in (said := capsys.readouterr()).err
    assert "drew 1 picture;" in said.out


def test_training_takes_the_folder_as_regularisation_pictures(tmp_path):
    main(words(tmp_path / "reg", 1, "--class_tokens", "thing"))
    options = TrainNetworkOptions(
        train_data_dir=str(PICTURES), reg_data_dir=str(tmp_path / "reg"), resolution="64", caption_extension=".txt"
    )
    scanned = scan_dataset(options)
    (record,) = [record for record in scanned.records if scanned.subsets[record.subset].is_reg]
    assert record.caption == "thing" and record.size_wh == (64, 64)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--class_tokens", "a/b"], "--class_tokens must be a name without folders"),
        (["--class_tokens", "a", "--resolution", "big"], "--resolution must be a size"),
        (["--class_tokens", "a", "--num_images", "0"], "--num_images must be at least 1, got 0"),
    ],
)
def test_mistakes_are_sentences_and_nothing_is_written(more, sentence, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    with pytest.raises(UserError, match=sentence):
        main([*words(tmp_path / "reg", 1), *more])
    assert not (tmp_path / "reg").exists()
