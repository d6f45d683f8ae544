"""tools/dataset_sheet.py: all pictures of a dataset in their buckets, as PNG and as a page that needs nothing else."""

import base64
import io
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.buckets import choose_buckets_of, repeats_of
from library.dataset.sampler import sampler_of
from library.dataset.scan import scan_dataset
from library.dataset.views import Views
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from library.recipes.dataset_sheet import first_draws, look_at_dataset, panels_of
from tests.test_preparing import size_of, smooth
from tests.test_scripts import run
from tools import dataset_sheet

CAPTION = '<b>一只猫</b> & "quotes", $title ${x}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of three shapes, one damaged, in `train/2_猫`; one of regularisation in `reg/1_animal`."""
    for name, seed, size_wh in (("a", 0, (128, 128)), ("b", 1, (200, 100)), ("c", 2, (90, 128)), ("d", 3, (200, 110))):
        (train := tmp_path / "train 数据" / "2_猫").mkdir(parents=True, exist_ok=True)
        smooth(seed, size_wh).save(train / f"{name}.png")
        (train / f"{name}.txt").write_text(f"{CAPTION}, {name}", encoding="utf-8")
    (train / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (reg := tmp_path / "reg" / "1_animal").mkdir(parents=True)
    smooth(9, (128, 128)).save(reg / "r.png")
    return tmp_path


def settings_of(folder: Path, **more: object) -> dict[str, object]:
    settings = dict(
        train_data_dir=str(folder / "train 数据"), reg_data_dir=str(folder / "reg"), resolution="128",
        enable_bucket=True, min_bucket_reso=64, max_bucket_reso=256, bucket_reso_steps=64, caption_extension=".txt",
    )  # fmt: skip
    return settings | more


def images_in(page: str, kind: str) -> list[np.ndarray]:
    sources = re.findall(rf'<img class="{kind}" [^>]*src="data:image/jpeg;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]


def test_the_page_shows_every_picture_and_needs_nothing_else(folder, tmp_path):
    config = tmp_path / "设置.toml"
    lines = [
        f"{name} = {str(value).lower() if value is True else repr(value)}"
        for name, value in settings_of(folder).items()
    ]
    config.write_text("\n".join([*lines, 'output_name = "猫 LoRA"', "network_dim = 8"]), encoding="utf-8")
    blocked = "for name in ('torch', 'diffusers', 'transformers', 'accelerate'): sys.modules[name] = None"
    arguments = ["--config_file", str(config), "--output_dir", str(tmp_path / "out"), "--thumbnail", "128"]
    done = run("tools/dataset_sheet.py", *arguments, prelude=blocked)
    assert done.returncode == 2 and "1 picture cannot be read" in done.stderr and "Traceback" not in done.stderr
    page = (tmp_path / "out" / "猫 LoRA-sheet.html").read_text(encoding="utf-8")
    assert size_of(tmp_path / "out" / "猫 LoRA-sheet.png")[0] > 300
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) > 5 and all(source.startswith(("data:image/jpeg;base64,", "#b")) for source in sources)
    assert "default-src 'none'" in page and "http" not in re.sub(r"http-equiv", "", page)
    assert len(images_in(page, "seen")) == 5
    captions = [unescape(caption) for caption in re.findall(r"<p>(.*?)</p>", page)]
    assert sorted(captions) == sorted([*(f"{CAPTION}, {name}" for name in "abcd"), "animal"])
    assert "<b>一只猫" not in page and "broken.jpg" in page


def test_pictures_are_shown_as_their_first_step_sees_them_and_the_whole_where_it_is_cut(folder):
    (folder / "train 数据" / "2_猫" / "broken.jpg").unlink()
    settings = settings_of(folder, seed=7, flip_aug=True, shuffle_caption=True, color_aug=True)
    options = dataset_sheet.OPTIONS(**settings)
    sheet = look_at_dataset(options, longest_side=256)
    scanned = scan_dataset(TrainNetworkOptions(**settings))
    choices, repeats = choose_buckets_of(scanned), repeats_of(scanned)
    views, drawn = Views(scanned, choices, 1600), {}
    for batch in sampler_of(scanned, choices, repeats, seed=7):
        for draw in batch:
            drawn.setdefault(scanned.records[draw.index].path.name, views.view(draw))
    shown = {picture.name.split("/")[1]: picture for bucket in sheet.buckets for picture in bucket.pictures}
    assert shown.keys() == drawn.keys()
    for name, picture in shown.items():
        seen = np.asarray(Image.open(io.BytesIO(picture.seen))).astype(int)
        zoom = seen.shape[0] // drawn[name].pixels.shape[0]
        assert np.abs(seen - drawn[name].pixels.repeat(zoom, 0).repeat(zoom, 1)).mean() < 4
        assert picture.caption == drawn[name].caption
        assert ("mirrored" in picture.marks) == drawn[name].flipped
    assert {name for name, picture in shown.items() if picture.whole} == {"b.png", "c.png", "d.png"}
    assert "enlarged" not in "".join(shown["a.png"].facts)
    assert [panel.title for panel in panels_of(sheet)] == [sheet.heading(bucket) for bucket in sheet.buckets]
    assert sum(bucket.num_repeats for bucket in sheet.buckets) == sheet.plan.num_items == 16


def test_a_picture_that_the_first_epoch_does_not_draw_is_shown_too(folder):
    (folder / "train 数据" / "2_猫" / "broken.jpg").unlink()
    scanned = scan_dataset(TrainNetworkOptions(**settings_of(folder)))
    choices = choose_buckets_of(scanned)
    draws = first_draws(scanned, choices, [1, 0, 2, 1, 0], seed=0, accumulation=1)
    assert [draw.index for draw in draws] == [0, 1, 2, 3, 4]


def test_without_a_place_for_the_files_nothing_is_looked_at():
    with pytest.raises(UserError, match="--html or --png is needed"):
        dataset_sheet.main(["--train_data_dir", "nowhere", "--resolution", "128"])
    with pytest.raises(UserError, match="--html must be an .html file"):
        dataset_sheet.main(["--train_data_dir", "nowhere", "--resolution", "128", "--html", "x.txt"])
