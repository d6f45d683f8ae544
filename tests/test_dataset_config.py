"""`--dataset_config`: several datasets, precedence, and mistakes with their place in the file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from library.dataset.buckets import choose_buckets_of, repeats_of
from library.dataset.dataset import TrainingDataset
from library.dataset.dataset_config import read_dataset_config
from library.dataset.dataset_config_keys import KEYS
from library.dataset.images import resize, to_model_input
from library.dataset.sampler import sampler_of
from library.dataset.scan import dataset_dirs, scan_dataset, tag_frequency
from library.errors import UserError
from library.options.groups import TrainNetworkOptions
from tests import tiny
from train_network import train


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, count in (("cats", 3), ("dogs", 2), ("animals", 1)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (128, 64 if index else 128)).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text(f"{name}, {index}", encoding="utf-8")
    return tmp_path


TWO_DATASETS = """
[general]
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
caption_extension = ".txt"
shuffle_caption = true
num_repeats = 2

[[datasets]]
resolution = 128
batch_size = 2
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "{folder}/cats"
  shuffle_caption = false

  [[datasets.subsets]]
  image_dir = "{folder}/animals"
  is_reg = true
  num_repeats = 1

[[datasets]]
resolution = [64, 64]

  [[datasets.subsets]]
  image_dir = "{folder}/dogs"
  class_tokens = "dog"
  flip_aug = true
"""


def written(folders: Path, text: str, name: str = "data.toml") -> TrainNetworkOptions:
    path = folders / name
    path.write_text(text.replace("{folder}", folders.as_posix()), encoding="utf-8")
    return TrainNetworkOptions(dataset_config=path, train_batch_size=4, flip_aug=False)


def test_a_value_of_a_subset_goes_before_its_dataset_and_that_before_general_and_flags(folders):
    specs, subsets, notes = read_dataset_config(written(folders, TWO_DATASETS))
    assert [(spec.resolution, spec.batch_size, spec.enable_bucket) for spec in specs] == [
        ("128", 2, True),
        ("64,64", 4, True),
    ]
    cats, animals, dogs = subsets
    assert (cats.shuffle_caption, animals.shuffle_caption, dogs.shuffle_caption) == (False, True, True)
    assert (cats.num_repeats, animals.num_repeats, dogs.num_repeats) == (2, 1, 2)
    assert (cats.keep_tokens, dogs.keep_tokens) == (1, 0)
    assert (cats.is_reg, animals.is_reg, dogs.flip_aug, dogs.class_tokens) == (False, True, True, "dog")
    assert [subset.dataset for subset in subsets] == [0, 0, 1]
    assert all(subset.caption_extension == ".txt" for subset in subsets) and notes == []


def test_false_in_the_file_goes_before_a_flag_that_is_set(folders):
    options = written(folders, TWO_DATASETS.replace("flip_aug = true", "flip_aug = false"))
    options = TrainNetworkOptions(dataset_config=options.dataset_config, flip_aug=True)
    _, subsets, _ = read_dataset_config(options)
    assert [subset.flip_aug for subset in subsets] == [True, True, False]


def test_batches_mix_neither_datasets_nor_sizes_and_have_their_datasets_batch_size(folders):
    scanned = scan_dataset(written(folders, TWO_DATASETS))
    repeats, choices = repeats_of(scanned), choose_buckets_of(scanned)
    assert repeats == [2, 2, 2, 6, 2, 2]  # one regularisation picture against three cats twice; none for the dogs
    batches = list(sampler_of(scanned, choices, repeats, seed=1))
    for batch in batches:
        datasets = {scanned.subsets[scanned.records[draw.index].subset].dataset for draw in batch}
        assert len(datasets) == 1 and len({choices[draw.index].bucket_wh for draw in batch}) == 1
        assert len(batch) <= (2 if datasets == {0} else 4)
    assert max(len(batch) for batch in batches) == 4
    assert {choices[4].bucket_wh, choices[5].bucket_wh} == {(64, 64)}


def test_json_says_the_same_as_toml(folders):
    import toml

    document = toml.loads(TWO_DATASETS.replace("{folder}", folders.as_posix()))
    as_json = written(folders, json.dumps(document), "data.json")
    assert read_dataset_config(as_json)[:2] == read_dataset_config(written(folders, TWO_DATASETS))[:2]


MISTAKES = {
    "unknown key": ("keep_tokens = 1", "keep_token = 1", r"datasets\[0\]: keep_token is not a key.* keep_tokens\?"),
    "wrong type": ("batch_size = 2", 'batch_size = "2"', r"datasets\[0\]: batch_size must be a whole number, got '2'"),
    "bool for int": ("batch_size = 2", "batch_size = true", r"batch_size must be a whole number, got True"),
    "wrong level": (
        "is_reg = true", "is_reg = true\n  batch_size = 3",
        r"datasets\[0\]\.subsets\[1\]: batch_size cannot stand here, only in \[general\] and \[\[datasets\]\]",
    ),
    "no folder": ("{folder}/dogs", "{folder}/dgos", r"image_dir: there is no folder .*dgos"),
    "no resolution": ("resolution = 128", "", r"datasets\[0\]: there is no resolution"),
    "out of range": ("resolution = 128", "resolution = 32", r"datasets\[0\]: resolution 32 must lie between .* 64"),
    "interpolation": ("keep_tokens = 1", 'resize_interpolation = "lancos"', r"interpolation must be one of lanczos"),
    "mixture": (
        "is_reg = true", 'metadata_file = "x.json"',
        r"datasets\[0\]: 1 of 2 subsets have a metadata_file; the others need a \[\[datasets\]\] of their own",
    ),
    "no metadata file": (
        'class_tokens = "dog"', 'metadata_file = "x.json"', r"data\.toml:29: metadata_file: there is no file x\.json"
    ),
    "folder key beside a file": (
        "flip_aug = true", 'metadata_file = "x.json"', r"datasets\[1\]\.subsets\[0\]: class_tokens does not go with"
    ),
    "face range": ("keep_tokens = 1", "face_crop_aug_range = [4, 2]", r"face_crop_aug_range must be two numbers"),
    "interpolation of a subset": ("flip_aug = true", 'resize_interpolation = "x"', r"dogs: resize_interpolation must"),
    "masks": ("flip_aug = true", 'conditioning_data_dir = "x"', r"conditioning_data_dir needs --masked_loss"),
    "top level": ("[general]", "[generals]", r"generals is not known at the top"),
    "not toml": ("[general]", "general]", r"data\.toml:2: not valid TOML: "),
    "path": ("{folder}/dogs", r"C:\pictures", r"data\.toml:\d+: not valid TOML: .* in single quotes"),
    "tab in path": ("{folder}/dogs", r"C:\train", r"datasets\[1\]\.subsets\[0\]: image_dir must be .* single quotes"),
    "no source": ('image_dir = "{folder}/dogs"', "", r"datasets\[1\]\.subsets\[0\] has no image_dir"),
    "repeats": ("num_repeats = 1", "num_repeats = 0", r"num_repeats must be at least 1, got 0"),
    "share": ("flip_aug = true", "caption_dropout_rate = 3", r"dogs: caption_dropout_rate must be a share from 0 to 1"),
    "count": ("flip_aug = true", "keep_tokens = -1", r"dogs: keep_tokens must be at least 0, got -1"),
    "separator": ("flip_aug = true", 'caption_separator = ""', r"dogs: caption_separator is empty"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place(mistake, folders):
    old, new, expected = MISTAKES[mistake]
    with pytest.raises(UserError, match=expected):
        read_dataset_config(written(folders, TWO_DATASETS.replace(old, new, 1)))


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(folders):
    text = TWO_DATASETS.replace("shuffle_caption = true", "shuffle_caption = 1").replace(
        "{folder}/dogs", "{folder}/dgos"
    )
    text = text.replace("is_reg = true", 'is_reg = "yes"').replace("flip_aug", "flip_agu")
    with pytest.raises(UserError) as error:
        read_dataset_config(written(folders, text))
    assert [problem.rpartition("/")[2].partition(",")[0] for problem in error.value.problems] == [
        "data.toml:7: general: shuffle_caption must be true or false",
        "data.toml:21: datasets[0].subsets[1]: is_reg must be true or false",
        "data.toml:30: datasets[1].subsets[0]: flip_agu is not a key; did you mean flip_aug?",
        "dgos",
    ]
    assert "data.toml:28: image_dir: there is no folder" in error.value.problems[3]
    with pytest.raises(UserError, match=r"data\.toml:20: datasets\[0\]\.subsets\[1\]: image_dir .*num_repeats must be"):
        read_dataset_config(written(folders, TWO_DATASETS.replace("num_repeats = 1", "num_repeats = 0")))
    with pytest.raises(UserError, match=r"data\.toml:10: datasets\[0\]: there is no resolution"):
        read_dataset_config(written(folders, TWO_DATASETS.replace("resolution = 128", "")))


def test_flags_of_folders_beside_the_file_are_told_to_have_no_effect(folders):
    options = written(folders, TWO_DATASETS)
    flags = dict(train_data_dir="x", conditioning_data_dir="y", masked_loss=True)
    notes = read_dataset_config(TrainNetworkOptions(dataset_config=options.dataset_config, **flags))[2]
    assert notes == [
        "--train_data_dir has no effect beside --dataset_config",
        "--conditioning_data_dir has no effect beside --dataset_config",
    ]


def test_a_folder_of_masks_that_is_not_there_is_told_with_the_file(folders):
    text = TWO_DATASETS.replace("flip_aug = true", 'conditioning_data_dir = "{folder}/masks"')
    options = TrainNetworkOptions(dataset_config=written(folders, text).dataset_config, masked_loss=True)
    with pytest.raises(UserError, match=r"data\.toml:30: conditioning_data_dir: there is no folder .*masks"):
        read_dataset_config(options)


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_a_separator_that_stays_in_captions_is_told(shuffle, folders):
    mark = f'keep_tokens_separator = ","\nshuffle_caption = {shuffle}'
    notes = scan_dataset(written(folders, TWO_DATASETS.replace("flip_aug = true", mark))).notes
    assert any("stays in the captions of" in note and "dogs" in note for note in notes) == (shuffle == "false")


def test_regularisation_pictures_alone_are_nothing_to_train(folders):
    only_reg = TWO_DATASETS.split("[[datasets]]")[1].replace("shuffle_caption = false", "is_reg = true")
    with pytest.raises(UserError, match="all subsets hold regularisation pictures"):
        scan_dataset(written(folders, f"[[datasets]]{only_reg}"))


def test_a_subset_without_num_repeats_takes_those_of_the_flag(folders):
    options = written(folders, TWO_DATASETS.replace("num_repeats = 2", ""))
    options = TrainNetworkOptions(dataset_config=options.dataset_config, dataset_repeats=5)
    assert [subset.num_repeats for subset in read_dataset_config(options)[1]] == [5, 1, 5]


def test_keys_of_folders_may_stand_in_general_beside_a_metadata_file(folders):
    (folders / "m.json").write_text("{}", encoding="utf-8")
    text = TWO_DATASETS.replace('class_tokens = "dog"', 'metadata_file = "{folder}/m.json"')
    text = text.replace("[general]", '[general]\nclass_tokens = "x"\ncache_info = true\nface_crop_aug_range = [2, 4]')
    cats, _, dogs = read_dataset_config(written(folders, text))[1]
    assert (cats.class_tokens, cats.cache_info, cats.metadata_file) == ("x", True, None)
    assert (dogs.class_tokens, dogs.cache_info, dogs.metadata_file.name) == (None, False, "m.json")
    assert cats.face_crop_aug_range == dogs.face_crop_aug_range == (2, 4)


def test_a_subset_is_resized_its_own_way(folders):
    text = TWO_DATASETS.replace("flip_aug = true", 'resize_interpolation = "nearest"')
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folders / "dogs" / "0.png")
    options = written(folders, text)
    dataset = TrainingDataset(scan_dataset(options), options, seed=0, max_train_steps=1)
    nearest = to_model_input(resize(pixels, (64, 64), "nearest"))
    assert np.array_equal(dataset.image(4).numpy(), nearest)


def test_a_folder_of_two_datasets_counts_once_in_tags_and_twice_among_folders(folders):
    text = TWO_DATASETS.replace("{folder}/dogs", "{folder}/cats")
    scanned = scan_dataset(written(folders, text))
    assert tag_frequency(scanned)["cats"] == {"cats": 3, "0": 1, "1": 1, "2": 1}
    assert set(dataset_dirs(scanned)) == {"cats", "cats (2)"}


def test_every_key_of_kohyas_is_known():
    facts = """batch_size resolution network_multiplier enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps
        bucket_no_upscale validation_split validation_seed resize_interpolation num_repeats shuffle_caption
        caption_separator keep_tokens keep_tokens_separator secondary_separator enable_wildcard caption_prefix
        caption_suffix token_warmup_min token_warmup_step color_aug flip_aug random_crop face_crop_aug_range
        custom_attributes caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate
        caption_extension class_tokens cache_info image_dir is_reg alpha_mask metadata_file conditioning_data_dir"""
    assert set(KEYS) == set(facts.split())


def test_a_run_trains_all_datasets_and_says_so_in_its_metadata(folders, tiny_file):
    options = written(folders, TWO_DATASETS)
    arguments = tiny.arguments(
        tiny_file, folders, folders / "out", train_data_dir=None, resolution=None, dataset_config=options.dataset_config
    )
    train(arguments)
    with safe_open(str(folders / "out" / "lora.safetensors"), "pt") as file:
        metadata = file.metadata()
    first, second = json.loads(metadata["ss_datasets"])
    assert (first["batch_size_per_device"], first["resolution"], first["num_train_images"]) == (2, [128, 128], 6)
    assert (second["resolution"], second["subsets"][0]["class_tokens"]) == ([64, 64], "dog")
    assert first["subsets"][1]["is_reg"] and first["subsets"][0]["image_dir"] == "cats"
    assert json.loads(metadata["ss_dataset_dirs"])["cats"] == {"n_repeats": 2, "img_count": 3}
    assert "ss_resolution" not in metadata and metadata["modelspec.resolution"] == "512x512"
