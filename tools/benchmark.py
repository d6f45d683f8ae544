"""How fast this suite trains beside others, in the same harness: interleaved rounds, a control, losses that agree.

python tools/benchmark.py --work build/benchmark --output build/benchmark/result.md
python tools/benchmark.py --work build/benchmark --size full --peer ../kohya --peer_python ../kohya/venv/bin/python

Needs no network. docs/benchmarks.md says how each figure is measured.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.files import write_text_whole
from tools.benchmarks.bench import Bench
from tools.benchmarks.contestants import DIFFUSERS_MODES, OUR_MODES, PEER_MODES, Contestant, contestants_of
from tools.benchmarks.fidelity import verdicts
from tools.benchmarks.harness import Control, Schedule, run_rounds
from tools.benchmarks.inputs import HERE, Inputs
from tools.benchmarks.machine import machine, peak_flops
from tools.benchmarks.measures import MEASURES
from tools.benchmarks.report import Outcome, as_json, markdown

RESOLUTIONS = {"toy": 64, "full": 512}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="keeps models and pictures between calls")
    add(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="write the tables there and all raw figures beside it as .json, anew after every round",
    )
    add("--measure", default="step,profile", help=f"of {','.join(MEASURES)}, or all (default: %(default)s)")
    add("--kind", choices=("sd1", "sdxl"), default="sd1")
    add("--size", choices=RESOLUTIONS, default="toy", help="of the random model (default: %(default)s)")
    add("--resolution", type=int, help="pixels, square (default: 64 for toys, 512)")
    add("--batch", type=int, default=1)
    add("--rank", type=int, default=32)
    add("--rounds", type=int, default=3, help="valid ones (default: %(default)s)")
    add("--spare_rounds", type=int, help="how many more to try where rounds are void (default: as many as --rounds)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="what is compared; cpu on a machine that others use")
    add("--steps", type=int, default=20, help="that count, of one run (default: %(default)s)")
    add("--warmup", type=int, default=3, help="steps before them; 20 on a GPU (default: %(default)s)")
    add(
        "--fidelity_steps",
        type=int,
        default=100,
        help="whose losses are compared (default: 100); with 0 no speed counts",
    )
    add("--mode", action="append", default=[], metavar="NAME=FLAGS", help=modes_help("ours", OUR_MODES))
    add("--diffusers_mode", action="append", default=[], metavar="NAME=FLAGS", help=modes_help("it", DIFFUSERS_MODES))
    add("--no_diffusers", action="store_true", help="leave the plain loop over diffusers out, but as a reference")
    add("--peer", type=Path, metavar="DIR", help="a checkout of kohya's sd-scripts")
    add("--peer_python", default=sys.executable, metavar="PYTHON", help="its interpreter (default: this one)")
    add("--peer_mode", action="append", default=[], metavar="NAME=FLAGS", help=modes_help("it", PEER_MODES))
    add("--cache_pictures", type=int, default=64, help="cached with a null VAE, an eighth with the real one")
    add("--scan_sizes", default="1000", help="pictures, as 1000,10000,100000 (default: %(default)s)")
    add("--machine", default=platform.node(), metavar="NAME", help="its name in the tables (default: %(default)s)")
    add("--peak_tflops", type=float, help="of the processor; known for some GPUs, else that of the control product")
    add("--timeout", type=float, default=3600, help="seconds of one run (default: %(default)s)")
    options = parser.parse_args(argv)
    options.measure = list(MEASURES) if options.measure == "all" else options.measure.split(",")
    if unknown := set(options.measure) - MEASURES.keys():
        parser.error(f"--measure: there is no {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    for mode in (*options.mode, *options.diffusers_mode, *options.peer_mode):
        if "=" not in mode:
            parser.error(f"a mode must be NAME=FLAGS, got {mode}")
    if min(options.rounds, options.steps, options.warmup) < 1:
        parser.error("--rounds, --steps and --warmup must be at least 1")
    if options.peer and not options.peer.is_dir():
        parser.error(f"--peer: {options.peer} is not a folder")
    return options


def modes_help(of: str, defaults: dict[str, str]) -> str:
    return f"a mode of {of}; may be repeated, and replaces the defaults: {', '.join(defaults)}"


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    work = options.work.resolve()
    resolution = options.resolution or RESOLUTIONS[options.size]
    inputs = Inputs(work, options.kind, options.size, resolution, options.batch, options.rank)
    say("making the model, where it is not there yet")
    inputs.make_models()
    sizes = tuple(int(size) for size in options.scan_sizes.split(","))
    bench = Bench(inputs, work / "runs", options.steps, options.warmup, options.cache_pictures, sizes, options.timeout)
    outcome = None
    for outcome in outcomes(options, bench):
        if options.output:
            write(outcome, options.output)
    say("\n" + markdown(outcome))


def outcomes(options: argparse.Namespace, bench: Bench) -> Iterator[Outcome]:
    """The same outcome after everything that was added to it: the losses are compared, then measures are taken."""
    facts = bench.inputs.torch_facts()
    control = Control(on_gpu=facts["gpu"] is not None)
    contestants = chosen_contestants(options)
    about, setup = machine(options.machine, facts), setup_of(options, bench)
    peak = peak_of(options, facts["gpu"], control)
    outcome = Outcome(about, setup, options.clock, contestants, {}, {}, facts["step_flops"], *peak)
    if options.fidelity_steps:
        say("losses")
        reference = Contestant("diffusers", "fp32", (), sys.executable, HERE / "diffusers_loop.py")
        outcome.verdicts = verdicts(bench, contestants, reference, options.fidelity_steps)
    yield outcome
    spare = options.rounds if options.spare_rounds is None else options.spare_rounds
    schedule = Schedule(options.rounds, spare, control, options.clock)
    for name in options.measure:
        say(name)
        measure = MEASURES[name]
        asked = measure.asked(contestants)
        rounds = outcome.rounds[name] = []
        for done in run_rounds(asked, partial(measure.run, bench), schedule if measure.in_rounds else Schedule(1)):
            rounds.append(done)
            say(f"  round {len(rounds)}: {'void, ' + done.void if done.void else 'valid'}")
            yield outcome


def chosen_contestants(options: argparse.Namespace) -> list[Contestant]:
    peer = options.peer.resolve() if options.peer else None
    modes = options.mode, options.diffusers_mode, options.peer_mode
    found = contestants_of(options.kind, *modes, peer, options.peer_python)
    return [who for who in found if who.kind != "diffusers" or not options.no_diffusers]


def setup_of(options: argparse.Namespace, bench: Bench) -> dict[str, str]:
    """What a reader must know of the runs."""
    inputs = bench.inputs
    training = f"{inputs.resolution}x{inputs.resolution}, batch {inputs.batch}, rank {inputs.rank} on the U-Net, AdamW"
    return {
        "model": f"{inputs.kind}, {inputs.size} size, random weights",
        "training": f"{training}, {bench.steps} steps after {bench.warmup}",
        "compared by": f"{options.clock} seconds",
    }


def write(outcome: Outcome, path: Path) -> None:
    """The tables, and all raw figures beside them."""
    write_text_whole(path, markdown(outcome))
    write_text_whole(path.with_suffix(".json"), json.dumps(as_json(outcome), indent=1, ensure_ascii=False))


def peak_of(options: argparse.Namespace, gpu: str | None, control: Control) -> tuple[float, str]:
    """FLOP/s at most, and whose they are."""
    if options.peak_tflops:
        return options.peak_tflops * 1e12, "as given"
    if known := peak_flops(gpu):
        return known, f"{gpu}, dense bf16"
    return control.flops_per_second(options.clock), "the control product's rate in fp32 on the CPU"


if __name__ == "__main__":
    main()
