"""Two processes on the CPU: their gradients are averaged, they keep the same weights, and one set of files appears."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.two_processes import toy_weights

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no")


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over torchrun is for Linux and macOS")
def test_two_processes_train_as_one_with_twice_the_accumulation(tiny_file, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 7\n", encoding="utf-8")
    toy = tiny.arguments(
        tiny_file, pictures, tmp_path / "toy", max_train_epochs=2, cache_latents=False, max_grad_norm=0
    )
    output = tmp_path / "输出 out"
    run = tiny.arguments(
        tiny_file, pictures, output, network_args=["module_dropout=0.5"], sample_prompts=prompts, before_after=True,
        save_state=True, sample_every_n_epochs=1,
    )  # fmt: skip
    given = {"toy": [*toy, "--ddp_timeout", "7"], "run": run, "facts": str(tmp_path / "facts.json")}
    (tmp_path / "given.json").write_text(json.dumps(given), encoding="utf-8")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [*LAUNCH, "--num_processes", "2", "--mixed_precision", "no", "-m", "tests.two_processes"]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "given.json")],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    first, second = torch.tensor(facts["weights"])
    assert torch.equal(first, second)
    alone, _ = toy_weights([*toy, "--gradient_accumulation_steps", "2"])
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)
    assert facts["timeout"] == 7 * 60

    names = sorted(path.name for path in output.iterdir())
    assert names == ["before_after.png", "lora-run.json", "lora-state", "lora.safetensors", "sample"]
    assert len(list((output / "sample").iterdir())) == 1
    assert (output / "lora-state" / "random_states_1.pkl").is_file()
    assert json.loads((output / "lora-state" / "train_state.json").read_text())["current_step"] == 4
    weights = load_file(output / "lora.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_up" in name)
    assert done.stdout.count("learning rate") == 1, "the table is for one process to print"
