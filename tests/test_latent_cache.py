import numpy as np
import pytest

from library.dataset.cache import CachedLatents, latents_path, read_latents, write_latents
from library.dataset.cache_check import BROKEN, WantedLatents, examine
from library.errors import UserError


def latents(seed=0, shape=(4, 8, 6)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cached(flipped=True, **changes):
    fields = {"latents": latents(), "original_size_wh": (300, 400), "crop_ltrb": (0.0, 1.5, 48.0, 62.5)}
    return CachedLatents(**(fields | {"latents_flipped": latents(1) if flipped else None} | changes))


@pytest.fixture
def wanted(tmp_path):
    """What `cached` is, of a picture that is older than any file written after it."""
    picture = tmp_path / "picture" / "x.png"
    picture.parent.mkdir()
    picture.write_bytes(b"pixels")
    return WantedLatents(
        picture, (300, 400), bucket_wh=(48, 64), crop_ltrb=(0.0, 1.5, 48.0, 62.5), resized="48x64 default",
        mirrored=False, masked=False, mask=None,
    )  # fmt: skip


@pytest.mark.parametrize("flipped", [True, False])
def test_written_latents_are_read_back(tmp_path, flipped):
    write_latents(tmp_path / "中文 x.npz", cached(flipped))
    result = read_latents(tmp_path / "中文 x.npz")
    assert np.array_equal(result.latents, latents())
    assert (result.original_size_wh, result.crop_ltrb) == ((300, 400), (0.0, 1.5, 48.0, 62.5))
    assert (result.latents_flipped is not None) == flipped
    assert [path.name for path in tmp_path.iterdir()] == ["中文 x.npz"]


def test_keys_and_types_are_kohyas(tmp_path):
    write_latents(tmp_path / "x.npz", cached())
    with np.load(tmp_path / "x.npz") as file:
        types = {key: (str(file[key].dtype), file[key].shape) for key in file}
    assert types == {
        "latents": ("float32", (4, 8, 6)),
        "original_size": ("int64", (2,)),
        "crop_ltrb": ("float64", (4,)),
        "latents_flipped": ("float32", (4, 8, 6)),
    }


def test_file_is_named_after_the_original_size_and_the_family(tmp_path):
    assert latents_path(tmp_path / "a.b.png", (300, 1400)) == tmp_path / "a.b_0300x1400_sd.npz"
    assert latents_path(tmp_path / "x.jpg", (20000, 8), "sdxl") == tmp_path / "x_20000x0008_sdxl.npz"


def test_older_file_without_a_size_goes_first_if_it_holds_latents(tmp_path):
    np.savez(tmp_path / "x.npz", mask=np.zeros(3))
    assert latents_path(tmp_path / "x.png", (300, 400)).name == "x_0300x0400_sd.npz"
    write_latents(tmp_path / "x.npz", cached())
    assert latents_path(tmp_path / "x.png", (300, 400)).name == "x.npz"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_torn_file_is_noticed_and_is_named_when_read(tmp_path, wanted, share):
    path = tmp_path / "x.npz"
    write_latents(path, cached())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert examine(path, wanted).reason == BROKEN
    with pytest.raises(UserError, match=r"x\.npz cannot be read"):
        read_latents(path)


def test_flipped_bits_are_noticed(tmp_path, wanted):
    path = tmp_path / "x.npz"
    write_latents(path, cached())
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(bytes(data))
    assert examine(path, wanted).reason == BROKEN


def test_pickles_are_refused(tmp_path, wanted):
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "x.npz", latents=objects, original_size=[1, 1], crop_ltrb=[0, 0, 1, 1])
    assert examine(tmp_path / "x.npz", wanted).reason == BROKEN
