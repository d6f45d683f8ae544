"""networks/average_lora.py: the mean of checkpoints of one run, under the metadata of the last."""

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.network_files import write_weights
from networks.average_lora import main
from tests.results import metadata_of


def weights_of(seed: int, rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "lora_unet_a.lora_down.weight": torch.randn(rank, 6, generator=drawn, dtype=torch.float16),
        "lora_unet_a.lora_up.weight": torch.randn(4, rank, generator=drawn),
        "lora_unet_a.alpha": torch.tensor(alpha),
    }


def test_the_mean_of_three_files_has_their_formats_and_the_metadata_of_the_last(tmp_path):
    paths = [tmp_path / f"平均 {number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        write_weights(path, weights_of(number), None, {"ss_epoch": str(number)})
    target = tmp_path / "new" / "mean.safetensors"
    main([*map(str, paths), "--save_to", str(target)])
    found, files = load_file(target), [load_file(path) for path in paths]
    for name, value in found.items():
        wanted = torch.stack([weights[name].double() for weights in files]).mean(0)
        assert value.dtype == files[0][name].dtype
        torch.testing.assert_close(value, wanted.to(value.dtype))
    assert metadata_of(target)["ss_epoch"] == "2"
    with pytest.raises(UserError, match="is there already"):
        main([*map(str, paths), "--save_to", str(target)])


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (weights_of(1, rank=3), "different ranks"),
        (weights_of(1, alpha=2.0), "lora_unet_a.alpha differs"),
        ({"lora_unet_b.alpha": torch.tensor(1.0)}, "only one of them has"),
    ],
)
def test_files_that_are_not_of_one_run_are_refused(other, problem, tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, weights in zip(paths, (weights_of(0), other), strict=True):
        write_weights(path, weights, None, None)
    with pytest.raises(UserError, match=problem):
        main([*map(str, paths), "--save_to", str(tmp_path / "c.safetensors")])
    assert not (tmp_path / "c.safetensors").exists()
