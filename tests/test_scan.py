import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from library.dataset.config import SubsetOptions
from library.dataset.repeat_folders import folder_notes, parse_repeat_folder, subsets_from_folders
from library.dataset.scan import (
    dataset_dirs,
    reg_dataset_dirs,
    scan,
    scan_dataset,
    tag_frequency,
    verify_pictures,
)
from library.errors import UserError
from library.options.groups import TrainNetworkOptions

GOLDEN = json.loads((Path(__file__).parent / "data/bucketing_and_caption_golden.json").read_text(encoding="utf-8"))


def options(train_data_dir, reg_data_dir=None, **changes):
    reg = None if reg_data_dir is None else str(reg_data_dir)
    return TrainNetworkOptions(train_data_dir=str(train_data_dir), reg_data_dir=reg, **changes)


def picture(path, size_wh=(48, 32), **save_options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh, "red").save(path, **save_options)
    return path


def caption(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))


def noisy_jpeg(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def scanned(folder, **subset_options):
    return scan([SubsetOptions(image_dir=folder, **subset_options)])


def one_caption(folder, **subset_options):
    (record,) = scanned(folder, **({"caption_extension": ".txt"} | subset_options)).records
    return record.caption


@pytest.mark.parametrize(("name", "repeats", "class_tokens"), GOLDEN["names"])
def test_folder_name_gives_repeats_and_class_tokens(name, repeats, class_tokens):
    assert parse_repeat_folder(name) == (repeats, class_tokens)


@pytest.mark.parametrize("name", ["cat", "_3_x", "3.5_x", "1e2_x", ""])
def test_folder_name_without_a_number_gives_none(name):
    assert parse_repeat_folder(name) is None


def test_folders_become_subsets_in_order_of_name_training_first(tmp_path):
    for name in ("train/3_b", "train/10_a", "train/.5_hidden", "reg/1_person"):
        picture(tmp_path / name / "x.png")
    subsets = subsets_from_folders(
        options(tmp_path / "train", tmp_path / "reg", keep_tokens=2, caption_extension="txt")
    )
    assert [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in subsets] == [
        ("10_a", 10, "a", False),
        ("3_b", 3, "b", False),
        ("1_person", 1, "person", True),
    ]
    assert {(s.keep_tokens, s.caption_extension) for s in subsets} == {(2, ".txt")}


def folder_problem(*paths):
    with pytest.raises(UserError) as error:
        subsets_from_folders(options(*paths))
    return str(error.value)


def test_missing_folder_is_named(tmp_path):
    assert folder_problem(tmp_path / "no") == f"--train_data_dir: there is no folder {tmp_path / 'no'}"
    with pytest.raises(UserError, match="--train_data_dir is missing"):
        subsets_from_folders(options("", None))


def test_file_in_place_of_a_folder_is_named(tmp_path):
    path = picture(tmp_path / "x.png")
    assert "must be a folder" in folder_problem(path)


def test_empty_folder_is_named(tmp_path):
    assert f"{tmp_path} is empty" in folder_problem(tmp_path)


def test_folder_one_level_too_deep_points_to_its_parent(tmp_path):
    picture(tmp_path / "2_yabin" / "x.png")
    assert f"use its parent {tmp_path}" in folder_problem(tmp_path / "2_yabin")


def test_folder_one_level_too_shallow_points_to_the_right_one(tmp_path):
    picture(tmp_path / "data" / "2_yabin" / "x.png")
    assert f"did you mean {tmp_path / 'data'}?" in folder_problem(tmp_path)


def test_folders_of_dates_without_pictures_are_not_taken_for_repeats(tmp_path):
    (tmp_path / "logs" / "20240101120000").mkdir(parents=True)
    assert "logs has" not in folder_problem(tmp_path)


def test_folder_without_a_number_is_told_its_new_name(tmp_path):
    picture(tmp_path / "yabin" / "x.png")
    assert "rename yabin to e.g. 10_yabin" in folder_problem(tmp_path)


def test_pictures_directly_in_the_data_folder_are_told_where_to_go(tmp_path):
    picture(tmp_path / "pics" / "x.png")
    assert str(tmp_path / "pics" / "10_pics") in folder_problem(tmp_path / "pics")


def test_mistakes_of_both_data_folders_come_together(tmp_path):
    problem = folder_problem(tmp_path / "a", tmp_path / "b")
    assert "--train_data_dir" in problem
    assert "--reg_data_dir" in problem


def test_regularisation_folder_must_be_another_one(tmp_path):
    picture(tmp_path / "1_x" / "x.png")
    assert "--reg_data_dir is the same folder" in folder_problem(tmp_path, tmp_path)


def test_what_is_left_out_beside_good_folders_is_noted(tmp_path):
    for name in ("2_good/a.png", "unnumbered/b.png", "0_never/c.png", "d.png"):
        picture(tmp_path / name)
    assert [s.image_dir.name for s in subsets_from_folders(options(tmp_path))] == ["2_good"]
    notes = "\n".join(folder_notes(options(tmp_path)))
    assert "10_unnumbered" in notes
    assert "0_never is left out" in notes
    assert "pictures directly in" in notes
    assert scan_dataset(options(tmp_path)).notes[:3] == folder_notes(options(tmp_path))


def test_pictures_are_found_in_any_case_sorted_and_not_hidden(tmp_path):
    for name in ("b.PNG", "a.Jpg", "c.webp", "d.bmp", "e.jpeg"):
        picture(tmp_path / name)
    (tmp_path / "._a.jpg").write_bytes(b"resource fork")
    (tmp_path / "notes.md").write_text("x")
    picture(tmp_path / "deeper" / "x.png")
    assert [record.path.name for record in scanned(tmp_path).records] == ["a.Jpg", "b.PNG", "c.webp", "d.bmp", "e.jpeg"]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_found_where_pillow_reads_it(tmp_path):
    picture(tmp_path / "a.avif", (48, 32))
    assert scanned(tmp_path).records[0].size_wh == (48, 32)


def test_picture_pillow_cannot_read_at_all_is_noted_not_fatal(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a")
    if ".jxl" in Image.registered_extensions():
        pytest.skip("this Pillow reads JPEG XL")
    assert any("b.jxl" in note for note in scanned(tmp_path).notes)


@pytest.mark.parametrize("name", ["with space.png", "中文 图片.png", "🦊.png", "éü.png"])
def test_names_of_any_script_are_read_with_their_captions(tmp_path, name):
    folder = tmp_path / "数据 ü 🦊"
    picture(folder / name)
    caption((folder / name).with_suffix(".txt"), "狐狸, fox")
    assert one_caption(folder) == "狐狸, fox"


@pytest.mark.parametrize("extension", [".jpg", ".webp", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_picture(tmp_path, extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / f"x{extension}", (48, 32), exif=exif)
    assert scanned(tmp_path).records[0].size_wh == ((32, 48) if orientation >= 5 else (48, 32))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
def test_captions_of_other_encodings_are_read(tmp_path, encoding):
    picture(tmp_path / "x.png")
    caption(tmp_path / "x.txt", "一只狐狸, fox", encoding)
    result = scanned(tmp_path, caption_extension=".txt")
    assert result.records[0].caption == "一只狐狸, fox"
    assert any("GBK" in note for note in result.notes) == (encoding == "gbk")


def test_gbk_caption_that_is_utf8_by_chance_follows_its_neighbours(tmp_path):
    for name, text in {"a": "猫", "b": "狐狸", "c": "cat"}.items():
        picture(tmp_path / f"{name}.png")
        caption(tmp_path / f"{name}.txt", text, "gbk")
    records = scanned(tmp_path, caption_extension=".txt").records
    assert [record.caption for record in records] == ["猫", "狐狸", "cat"]


def test_accents_in_utf8_are_not_taken_for_gbk(tmp_path):
    picture(tmp_path / "a.png")
    caption(tmp_path / "a.txt", "café, Вена")
    assert one_caption(tmp_path) == "café, Вена"


def test_caption_of_no_known_encoding_is_named(tmp_path):
    picture(tmp_path / "x.png")
    caption(tmp_path / "x.txt", b"\xff\xff\xff")
    with pytest.raises(UserError, match=r"x\.txt is neither UTF-8"):
        scanned(tmp_path, caption_extension=".txt")


def test_caption_is_the_first_line_unless_wildcards_want_all(tmp_path):
    picture(tmp_path / "x.png")
    caption(tmp_path / "x.txt", " one \r\n\r\n two \n")
    assert one_caption(tmp_path) == "one"
    assert one_caption(tmp_path, enable_wildcard=True) == "one\ntwo"


def test_empty_caption_file_counts_as_found(tmp_path):
    picture(tmp_path / "x.png")
    caption(tmp_path / "x.txt", "")
    result = scanned(tmp_path, caption_extension=".txt", class_tokens="cat")
    assert (result.records[0].caption, result.records[0].caption_found) == ("", True)
    assert any("empty" in note for note in result.notes)


def test_missing_caption_falls_back_to_class_tokens(tmp_path):
    picture(tmp_path / "x.png")
    assert one_caption(tmp_path, class_tokens="cat") == "cat"
    assert one_caption(tmp_path) == ""
    (note,) = scanned(tmp_path, class_tokens="cat").notes
    assert note == f'0 of 1 pictures in {tmp_path} have .caption files; all get the caption "cat" of the folder\'s name'


def test_cut_out_face_uses_the_caption_of_the_whole_picture(tmp_path):
    picture(tmp_path / "x_y_10_20_30_40.png")
    caption(tmp_path / "x_y.txt", "cat")
    assert one_caption(tmp_path) == "cat"


def test_txt_is_taken_where_no_picture_has_the_configured_extension(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
        caption(tmp_path / f"{i}.txt", f"cat {i}")
    result = scanned(tmp_path)
    assert [record.caption for record in result.records] == ["cat 0", "cat 1", "cat 2"]
    assert result.subsets[0].caption_extension == ".txt"
    assert result.notes == [f"0 of 3 pictures in {tmp_path} have .caption files, 3 have .txt: taking .txt"]


def test_configured_extension_wins_where_any_picture_has_it(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
        caption(tmp_path / f"{i}.txt", "txt")
    caption(tmp_path / "0.caption", "caption")
    result = scanned(tmp_path)
    assert [record.caption for record in result.records] == ["caption", ""]
    assert result.notes == [f"1 of 2 pictures in {tmp_path} have .caption files; the others get an empty caption"]


def test_pictures_that_share_a_name_are_noted(tmp_path):
    picture(tmp_path / "x.png")
    picture(tmp_path / "x.jpg")
    assert any("share caption and cache file" in note for note in scanned(tmp_path).notes)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_lead_to_no_picture_are_noted(tmp_path):
    picture(tmp_path / "x.png")
    for name, target in {
        "there.png": "x.png",
        "gone.png": "nowhere.png",
        "gone.txt": "no.txt",
        "circle.png": "circle.png",
    }.items():
        (tmp_path / name).symlink_to(target)
    result = scanned(tmp_path)
    assert [record.path.name for record in result.records] == ["there.png", "x.png"]
    (note,) = [note for note in result.notes if note.startswith("links in ")]
    assert "circle.png" in note and "gone.png" in note and "gone.txt" not in note


def test_all_unreadable_pictures_are_named_with_reasons(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UserError) as error:
        scanned(tmp_path)
    assert error.value.problems == [
        f"2 pictures cannot be read: {tmp_path / 'empty.png'} (the file is empty), "
        f"{tmp_path / 'text.jpg'} (not a picture that Pillow knows)"
    ]


def test_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "x.png", (48, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"x\.png \(more than .* make it smaller"):
        scanned(tmp_path)


def test_subsets_without_any_picture_are_a_mistake(tmp_path):
    (tmp_path / "10_x").mkdir()
    with pytest.raises(UserError, match="there are no pictures in .*10_x"):
        scanned(tmp_path / "10_x")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_truncated_jpeg_is_found_by_verifying(tmp_path, share):
    path = noisy_jpeg(tmp_path / "x.jpg")
    picture(tmp_path / "good.png")
    data = path.read_bytes()
    verify_pictures(scanned(tmp_path).records, num_threads=1)
    path.write_bytes(data[: int(len(data) * share)])
    records = scanned(tmp_path).records
    with pytest.raises(UserError, match=r"^1 picture cannot be read: .*x\.jpg \(.*truncated"):
        verify_pictures(records, num_threads=1)


def test_progress_ends_at_the_number_of_pictures(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    calls = []
    records = scan([SubsetOptions(image_dir=tmp_path)], progress=lambda *call: calls.append(call)).records
    verify_pictures(records, progress=lambda *call: calls.append(call))
    assert calls == [(3, 3), (1, 3), (2, 3), (3, 3)]  # a folder at once, then each picture


def test_metadata_counts_tags_and_pictures_of_each_folder(tmp_path):
    for name, text in {"2_dog/a": "Dog", "3_cat/b": "cat, red", "3_cat/c": "cat,, toy"}.items():
        picture(tmp_path / "train" / f"{name}.png")
        caption(tmp_path / "train" / f"{name}.caption", text)
    picture(tmp_path / "reg" / "1_dog" / "r.png")
    result = scan_dataset(options(tmp_path / "train", tmp_path / "reg"))
    assert tag_frequency(result) == {"2_dog": {"dog": 1}, "3_cat": {"cat": 2, "red": 1, "toy": 1}, "1_dog": {"dog": 1}}
    assert dataset_dirs(result) == {
        "2_dog": {"n_repeats": 2, "img_count": 1},
        "3_cat": {"n_repeats": 3, "img_count": 2},
    }
    assert reg_dataset_dirs(result) == {"1_dog": {"n_repeats": 1, "img_count": 1}}
