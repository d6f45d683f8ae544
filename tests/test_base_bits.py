"""tools/compare_base_bits.py: what it costs to hold a U-Net in fewer bits."""

import pytest

from library.errors import UserError
from tests import tiny
from tools.compare_base_bits import main


def table(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:]]
    return {form: cells for form, *cells in rows}


def test_fewer_bits_take_less_memory_and_more_of_the_output(model_file, pictures, capsys):
    main([str(model_file), "--train_data_dir", str(pictures), "--resolution", "64", "--max_pictures", "2"])
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["fp32", "bf16", "int8", "fp8", "nf4"]
    unet = tiny.models("sdxl" if "sdxl" in model_file.name else "sd1").unet
    num_bytes = 4 * sum(value.numel() for value in unet.parameters())
    sizes = [float(cells[0]) for cells in rows.values()]
    assert sizes[0] == pytest.approx(num_bytes / 1e6, abs=0.06)
    assert sizes == sorted(sizes, reverse=True) and sizes[4] < 0.25 * sizes[0]
    for column in (1, 3):  # against fp32, without and with the network
        errors = {form: float(cells[column].rstrip("%")) for form, cells in rows.items() if form != "fp32"}
        assert 0 < errors["bf16"] < errors["fp8"] < errors["nf4"] < 50
    assert all(float(cells[5]) > 0 for cells in rows.values())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--resolution", "100"], "--resolution must be a multiple of 64, got 100"),
        (["--max_pictures", "0"], "--max_pictures must be at least 1, got 0"),
        (["--train_data_dir", "."], "train_data_dir: there are no pictures in"),
        (["nowhere.safetensors"], "model: the file nowhere.safetensors does not exist"),
    ],
)
def test_mistakes_are_sentences(given, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main(given)
    assert sentence in str(raised.value)
