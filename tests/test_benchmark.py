"""The benchmark sees what a trainer of anyone does, compares only what trains the same, and says what is void."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools import benchmark
from tools.benchmarks import report
from tools.benchmarks.bench import Bench
from tools.benchmarks.contestants import Contestant, contestants_of
from tools.benchmarks.fidelity import Verdict, verdict, verdicts
from tools.benchmarks.harness import Round, RunFailed, Schedule, drift, run_rounds
from tools.benchmarks.inputs import Inputs
from tools.benchmarks.machine import peak_flops
from tools.benchmarks.measures import MEASURES, percentile, profile, save, start, step
from tools.benchmarks.parts import LATENT_READS, SCANS, latent_read, scan
from tools.benchmarks.scan_folder import SCANNED

# Stands in for a checkout of sd-scripts, which is not here: it reads kohya's flags, makes a dataset in the place where
# sd-scripts make theirs, and learns the identity.
CONFIG_UTIL = """
import os, time

def generate_dataset_group_by_blueprint(folder):
    time.sleep(0.2)
    return sorted(os.listdir(folder))
"""
STAND_IN = """
import argparse, os, time

parser = argparse.ArgumentParser()
for flag in ("max_train_steps", "save_every_n_steps", "seed"):
    parser.add_argument(f"--{flag}", type=int, default=0)
for flag in ("train_data_dir", "output_dir", "tokenizer_cache_dir", "pretrained_model_name_or_path"):
    parser.add_argument(f"--{flag}", required=True)
parser.add_argument("--cache_latents", action="store_true")
parser.add_argument("--wrong", type=float, default=1.0)
parser.add_argument("--own_numbers", action="store_true")
options = parser.parse_known_args()[0]

from library import config_util

assert config_util.generate_dataset_group_by_blueprint(options.train_data_dir)

import torch
from torch.utils.data import DataLoader

assert os.environ["HF_HUB_OFFLINE"] == "1"
torch.manual_seed(options.seed)
torch.randn(3) if options.own_numbers else None
model = torch.nn.Linear(16, 16)
torch.nn.init.kaiming_uniform_(model.weight)
torch.nn.init.zeros_(model.bias)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
print("losses", end="")
for step, _ in enumerate(DataLoader(range(options.max_train_steps)), start=1):
    noise = torch.randn(1, 4, 8, 8).view(16, 16)
    if options.own_numbers:
        noise = torch.empty(16, 16).normal_()
    loss = torch.nn.functional.mse_loss(model(noise), noise) * options.wrong
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f" {loss.item():.9g}", end="")
    if options.save_every_n_steps and not step % options.save_every_n_steps:
        time.sleep(0.5)
"""


class Readings:
    """A control whose readings are given."""

    def __init__(self, *walls: float):
        self.walls = list(walls)

    def read(self) -> dict[str, float]:
        wall = self.walls.pop(0) if len(self.walls) > 1 else self.walls[0]
        return {"wall": wall, "cpu": 1.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("基准 benchmark")
    inputs = Inputs(work, "sd1", "toy", resolution=64, batch=1, rank=4)
    return Bench(inputs, work / "runs", steps=5, warmup=2, num_cached=16, scan_sizes=(20,), timeout=120)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd-scripts")
    for name in ("train_network.py", "sdxl_train_network.py"):
        (folder / name).write_text(STAND_IN, encoding="utf-8")
    (folder / "library").mkdir()
    (folder / "library" / "config_util.py").write_text(CONFIG_UTIL, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def peer(checkout) -> Contestant:
    """The stand-in checkout in one mode."""
    return contestants_of("sd1", [], [], ["fp32="], checkout, sys.executable)[-1]


def test_a_foreign_program_is_measured_by_its_optimizer_loss_and_loader(bench, peer):
    figures = step(bench, peer)
    assert 0 < figures["step_s"] <= figures["step_p95_s"]
    assert figures["step_cpu_s"] > 0 and figures["wait_ms"] > 0
    assert 0.05 < figures["rss_gib"] < 4
    folder = bench.folder_of(peer)
    printed = (folder / "printed.log").read_text(encoding="utf-8").split()[1:]
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    assert len(printed) == 7 and facts["losses"] == pytest.approx([float(loss) for loss in printed])
    walls = [wall for wall, _, _ in facts["steps"]]
    assert all(0 < of_loop < of_all + 0.01 for _, of_all, of_loop in facts["steps"])
    assert walls == sorted(walls) and walls[-1] < facts["wall_s"]


def test_a_stall_at_a_save_is_seen_above_its_noise(bench, peer):
    figures = save(bench, peer)
    assert figures["stall_ms"] > 200 and 0 <= figures["noise_ms"] < figures["stall_ms"] / report.ABOVE_NOISE
    assert figures["stall_cpu_ms"] < 100  # it sleeps


def test_help_is_timed_without_torch_and_the_first_step_with_it(bench, peer):
    figures = start(bench, peer)
    assert figures["help_mib"] < 100 and figures["help_cpu_s"] < figures["warm_cpu_s"]


def test_operations_and_waits_of_one_step_are_counted(bench, peer):
    figures = profile(bench, peer)
    assert figures["waits"] == 1  # loss.item()
    forward_and_backward = 5 + 4  # randn, addmm, mse_loss, mul, ones_like; mul, mse_loss, mm, sum and zero_grad
    assert forward_and_backward < figures["kernels"] < 80


def test_numbers_are_the_same_in_programs_that_draw_differently_and_a_wrong_loss_does_not_count(bench, peer):
    seeded = replace(peer, mode="seeded", flags=("--seed", "7"))
    wrong = replace(peer, mode="wrong", flags=("--wrong", "1.02"))
    foreign = replace(peer, mode="foreign", flags=("--own_numbers",))
    dead = replace(peer, mode="dead", flags=("--seed", "many"))
    found = verdicts(bench, [peer, seeded, wrong, foreign, dead], peer, 600)
    assert len(set(found["kohya fp32"].losses)) == 600
    assert found["kohya seeded"].losses == found["kohya fp32"].losses
    assert not found["kohya wrong"].counts and "the mean of 600 by 2.00%" in found["kohya wrong"].why
    assert found["kohya foreign"].counts
    assert found["kohya foreign"].why.endswith("means alone were compared, the numbers drawn are others")
    assert not found["kohya dead"].counts and "invalid int value: 'many'" in found["kohya dead"].why


@pytest.mark.parametrize(
    ("losses", "is_reduced", "is_foreign", "counts"),
    [
        ([1.0, 2.0], False, False, True),
        ([1.000009, 2.0], False, False, True),
        ([1.00002, 2.0], False, False, False),
        ([1.00002, 2.0], False, True, True),
        ([1.01, 2.01], True, False, True),
        ([1.02, 2.02], True, False, False),
        ([1.0, 2.1], False, True, False),
        ([1.0], False, False, False),
        ([1.0, math.nan], True, True, False),
    ],
)
def test_what_must_agree(losses, is_reduced, is_foreign, counts):
    assert verdict(losses, [1.0, 2.0], is_reduced, is_foreign).counts == counts


def measured(walls: list[float], rounds: int = 2, spare: int = 2) -> list[Round]:
    """Rounds of two contestants, the second twice as slow, with these readings of the control."""
    schedule = Schedule(rounds, spare, Readings(*walls))
    return list(run_rounds(CONTESTANTS, lambda who: FIGURES[who.name], schedule))


CONTESTANTS = [
    Contestant("ours", "fp32", ("--cache_latents",), "python", Path("train_network.py")),
    Contestant("diffusers", "fp32", (), "python", Path("diffusers_loop.py")),
]
FIGURES = {
    "ours fp32": {"step_s": 1.0, "step_p95_s": 1.5, "step_cpu_s": 1.0, "rss_gib": 2.0, "gpu_gib": 0.0, "wait_ms": 1.0},
    "diffusers fp32": {"step_s": 2.0, "step_p95_s": 2.5, "step_cpu_s": 2.0, "rss_gib": 4.0, "gpu_gib": 0.0},
}


def test_a_round_in_which_the_machine_changes_is_void_and_repeated():
    rounds = measured([1.0, 1.2, 1.0, 1.0])
    assert [bool(done.void) for done in rounds] == [True, False, False]
    assert "20%" in rounds[0].void


def test_rounds_on_machines_of_different_speed_are_not_put_together():
    rounds = measured([1.0, 1.0, 1.0, 1.3])
    assert [bool(done.void) for done in rounds] == [False, True, True, True]


def test_a_machine_that_never_rests_ends_with_a_table_marked_void():
    rounds = measured([1.0, 2.0] * 20)
    assert len(rounds) == 4
    assert "**VOID**" in report.markdown(outcome_of(rounds))


def test_who_fails_is_not_asked_again():
    def fails(who: Contestant) -> dict[str, float]:
        if who.kind == "ours":
            raise RunFailed("out of memory")
        return FIGURES[who.name]

    rounds = list(run_rounds(CONTESTANTS, fails, Schedule(3)))
    assert [done.failures for done in rounds] == [{"ours fp32": "out of memory"}, {}, {}]
    assert "ours fp32 failed: out of memory" in report.markdown(outcome_of(rounds))
    assert drift([{"wall": 2.0}, {"wall": 2.5}], ("wall", "gpu")) == pytest.approx(0.25)


def outcome_of(rounds: list[Round], measure: str = "step", clock: str = "wall") -> report.Outcome:
    """An outcome of these rounds, in which all losses agree."""
    machine, agree = {"processor": "abacus", "GPU": "none"}, {who.name: Verdict(True, "") for who in CONTESTANTS}
    return report.Outcome(machine, {}, clock, CONTESTANTS, agree, {measure: rounds}, 10**9, 1e10, "as given")


def test_tables_have_medians_ratios_and_the_share_of_the_peak():
    rounds = measured([1.0])
    rounds[0].figures["ours fp32"] = FIGURES["ours fp32"] | {"step_s": 1.2}
    text = report.markdown(outcome_of(rounds))
    assert "- processor: abacus" in text
    assert "| ours fp32 | 1.100 | 1.500 | 1.000 | 1.00 | 2.00 | 0.00 | 9.1% |" in text
    assert "| ours fp32 | 1 | 0.55 (0.50–0.60) |" in text


def test_speeds_of_who_trains_something_else_are_struck_out():
    outcome = outcome_of(measured([1.0]))
    outcome.verdicts = {
        "ours fp32": verdict([3.0], [1.0], False, False),
        "diffusers fp32": verdict([1], [1], False, False),
    }
    text = report.markdown(outcome)
    assert "| ours fp32 | **no** |" in text
    assert "| ours fp32 (does not count) | ~~1.000~~ |" in text and "0.50" not in text


def test_without_a_comparison_of_losses_no_speed_counts():
    outcome = outcome_of(measured([1.0]))
    outcome.verdicts = {}
    text = report.markdown(outcome)
    assert "**Losses were not compared**" in text and "Ratio" not in text
    assert "| ours fp32 (not compared) | 1.000 |" in text


@pytest.mark.parametrize(
    ("ours", "others", "shown"),
    [
        ((8.0, 2.0), (100.0, 10.0), "0.080 (0.080–0.080)"),
        ((1.0, 2.0), (100.0, 10.0), "0.020 (0.020–0.020)"),  # less than its noise
        ((-5.0, 2.0), (100.0, 10.0), "0.020 (0.020–0.020)"),
        ((8.0, 2.0), (100.0, 40.0), None),
    ],
)
def test_a_stall_is_divided_by_one_that_is_above_its_noise(ours, others, shown):
    pairs = {"ours fp32": ours, "diffusers fp32": others}
    figures = {name: {"stall_cpu_ms": stall, "noise_cpu_ms": noise} for name, (stall, noise) in pairs.items()}
    text = report.markdown(outcome_of([Round(figures)], "save", clock="cpu"))
    assert f"| ours fp32 | 1 | {shown} |" in text if shown else "Ratio" not in text


def test_the_json_has_all_raw_figures():
    rounds = measured([1.0])
    rounds[0].figures["ours fp32"] = {"step_s": math.nan}
    facts = json.loads(json.dumps(report.as_json(outcome_of(rounds)), allow_nan=False))
    assert facts["rounds"]["step"][0]["figures"]["ours fp32"] == {"step_s": None}
    assert facts["rounds"]["step"][1]["figures"] == FIGURES
    assert facts["contestants"][0]["flags"] == ["--cache_latents"]


def test_small_things():
    assert percentile([1, 2, 3, 4, 5], 50) == 3 and percentile([0, 10], 95) == 9.5
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("abacus") is None
    bf16 = replace(CONTESTANTS[0], flags=("--mixed_precision", "bf16"))
    assert bf16.is_reduced and not CONTESTANTS[0].is_reduced


def test_the_imitation_of_kohyas_scan_finds_what_ours_finds(bench):
    ours, imitation = (scan(bench, who) for who in SCANS)
    assert ours["found"] == imitation["found"]
    for key in (f"20: {state}: {SCANNED}{unit}" for state in ("cold", "warm") for unit in ("", ", CPU")):
        assert key in ours and imitation[key] > 0


def test_the_dataset_of_a_checkout_is_timed_in_its_own_program(bench, peer):
    figures = scan(bench, peer)
    assert figures.keys() == {f"20: {state}: {SCANNED}{unit}" for state in ("cold", "warm") for unit in ("", ", CPU")}
    assert figures[f"20: cold: {SCANNED}"] > 0.2 > figures[f"20: cold: {SCANNED}, CPU"]
    printed = (bench.folder_of(peer) / "printed.log").read_text(encoding="utf-8")
    assert printed == ""  # it went no further


def test_latents_are_read_in_three_ways_that_find_the_same(bench):
    found = [latent_read(bench, who) for who in LATENT_READS]
    assert len({figures.pop("found") for figures in found}) == 1
    assert all(milliseconds > 0 for figures in found for milliseconds in figures.values())


@pytest.mark.parametrize("argument", ["--measure=speed", "--mode=fp32", "--rounds=0", "--peer=nowhere"])
def test_mistakes_are_told(argument, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--work", str(tmp_path), argument])
    assert argument[:6] in capsys.readouterr().err or "mode" in argument


def test_scans_have_lines_of_their_own_and_a_ratio_where_they_find_the_same():
    ours, imitation = (who.name for who in SCANS)
    figures = {
        ours: {"20: cold": 0.25, "20: cold, CPU": 0.25, "20: audit": 0.5, "20: audit, CPU": 0.25, "found": 7},
        imitation: {"20: cold": 0.5, "20: cold, CPU": 0.4, "found": 7},
    }
    text = report.markdown(outcome_of([Round(figures)], "scan"))
    assert "| 20: cold | 0.250 | 0.250 | 0.500 | 0.400 | 0.50 (0.50–0.50) |" in text
    assert "| 20: audit | 0.500 | 0.250 | – | – | – |" in text
    figures[imitation]["found"] = 8
    text = report.markdown(outcome_of([Round(figures)], "scan"))
    assert "| 20: cold | 0.250 | 0.250 | 0.500 | 0.400 |\n" in text and "**Does not count**" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_ours_and_the_plain_loop_agree_and_the_stand_in_does_not(kind, checkout, tmp_path):
    """In fp32 ours and the plain loop have the same losses, by different code; every measure has its figures."""
    text = "" if kind == "sd1" else " --cache_text_encoder_outputs"
    benchmark.main(
        f"--kind {kind} --size toy --rank 4 --rounds 1 --spare_rounds 0 --steps 3 --warmup 1 --fidelity_steps 3 "
        "--measure all --cache_pictures 16 --scan_sizes 20 --diffusers_mode fp32= --peer_mode fp32=".split()
        + ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "result.md"), "--peer", str(checkout)]
        + ["--mode", f"fp32=--cache_latents{text}"]
        + ["--mode", f"bf16=--cache_latents --mixed_precision bf16{text}"]
    )
    facts = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    counts = {name: found["counts"] for name, found in facts["verdicts"].items()}
    assert counts == {"diffusers fp32": True, "ours fp32": True, "ours bf16": True, "kohya fp32": False}
    ours, loop = (facts["verdicts"][name]["losses"] for name in ("ours fp32", "diffusers fp32"))
    assert ours == pytest.approx(loop, abs=1e-5)
    assert not [done["failures"] for rounds in facts["rounds"].values() for done in rounds if done["failures"]]
    assert facts["rounds"].keys() == MEASURES.keys()
    for name, rounds in facts["rounds"].items():
        for figures in rounds[0]["figures"].values():
            assert {column.key for column in MEASURES[name].columns} <= figures.keys()
    assert facts["step_flops"] > 1e8
    text = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert "## Caching latents" in text and "| kohya fp32 (does not count) |" in text
