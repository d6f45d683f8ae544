"""The flags of tools/xyz_grid.py, and what a grid is made of. Needs no torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import UserError
from library.families.detect import inspect_checkpoint
from library.generating.axes import Axis, Cell, build_axis
from library.generating.preparation import NetworkFile, family_for, module_of, network_problems
from library.generating.requests import PictureRequest
from library.generating.runs import SavedNetwork, find_run
from library.network_choice import check_network_module
from library.options.checks import at_least, existing_file
from library.options.derived import DEFAULT_NETWORK
from library.options.fields import OptionGroup, option
from library.options.groups import SAMPLERS, ModelOptions
from library.preflight import Problems
from library.training.prompts import SamplePrompt, prompts_of

USUAL_SEED = 1  # of prompts that have none


@dataclass(frozen=True, kw_only=True)
class GridOptions(OptionGroup):
    """Draw a table of pictures over networks, strengths, prompts, seeds, samplers, scales or steps"""

    run: str | None = option(
        None, "OUTPUT_DIR/NAME of a run of training: its networks, base model and prompts", flag_type="path"
    )
    ckpt: str | None = option(None, "base model; the run's when not given", flag_type="path")
    network_weights: list[str] | None = option(None, "networks to compare; the run's when not given", flag_type="path")
    network_module: str | None = option(None, "their algorithm; what files tell when not given")
    prompts: str | None = option(
        None, "prompts, one a line, or a file of them; the run's sample prompts when not given", flag_type="prompts"
    )
    x: str = option("epoch", "what changes from left to right: epoch, strength, prompt, seed, sampler, cfg or steps, "
                    "with values behind = such as strength=0.5-1.0:0.25")  # fmt: skip
    y: str = option("strength=0.5-1.0", "what changes from top to bottom")
    z: str | None = option(None, "what changes from table to table; prompt where there are several")
    seed: int | None = option(None, "seed of prompts that have none, 1 when not given")
    sampler: str | None = option(None, "sampler; the run's, or ddim, when not given", choices=SAMPLERS)
    steps: int | None = option(None, "steps of all prompts; their own when not given")
    scale: float | None = option(None, "scale of guidance of all prompts; their own when not given")
    strength: float = option(1.0, "strength of the networks where no axis has it")
    clip_skip: int | None = option(None, "text encoder's layer N from the end; the run's when not given")
    vae: str | None = option(None, "VAE to use; the run's when not given", flag_type="path")
    v_parameterization: bool = option(False, "the model predicts velocity (v) instead of noise")
    bf16: bool = option(False, "compute in bf16; as the run did when nothing is given")
    fp16: bool = option(False, "compute in fp16, on a GPU")
    output: str | None = option(None, "folder for the grid; NAME-grid beside the networks when not given",
                                flag_type="path")  # fmt: skip

    def check(self) -> list[str]:
        problems = at_least(self, 1, "steps", "clip_skip") + at_least(self, 0, "seed", "scale")
        for path in self.network_weights or []:
            problems += existing_file("network_weights", path)
        if not self.run and not (self.ckpt and self.prompts):
            problems.append("--run OUTPUT_DIR/NAME, or --ckpt, --network_weights and --prompts, say what to draw")
        kinds = [text.partition("=")[0].strip() for text in (self.x, self.y, self.z) if text]
        if len({*kinds}) < len(kinds):
            problems.append(f"--x, --y and --z must change different things, got {', '.join(kinds)}")
        if self.bf16 and self.fp16:
            problems.append("--fp16 does not go with --bf16: give one")
        return problems


@dataclass(frozen=True)
class GridPlan:
    """What a grid shows, and of which model."""

    title: str
    base: Path
    family: str
    model: ModelOptions
    module: str | None  # None: what each file tells
    precision: str  # as --mixed_precision has it
    x: Axis
    y: Axis
    z: Axis | None
    first: Cell  # what all cells have where no axis says otherwise
    sampler: str
    folder: Path
    networks: list[SavedNetwork]

    @property
    def axes(self) -> list[Axis]:
        """From the slowest to the fastest."""
        return [axis for axis in (self.z, self.y, self.x) if axis]


def plan_grid(options: GridOptions) -> GridPlan:
    """All that is needed, found and checked; a UserError names every problem."""
    problems = Problems()
    attempt = problems.attempt
    run = attempt(find_run, options.run) if options.run else None
    if problems:
        raise UserError(*problems)
    of_run = run.option if run else lambda name: None
    networks = run.networks if run else []
    if options.network_weights:
        networks = [SavedNetwork(Path(path), Path(path).stem) for path in options.network_weights]
    module = options.network_module or of_another_project(of_run("network_module"))
    problems += check_network_module(module or DEFAULT_NETWORK)
    base = options.ckpt or of_run("pretrained_model_name_or_path")
    if not base:
        raise UserError(f"--ckpt is needed: {options.run} has no record that names its base model")
    checkpoint = attempt(inspect_checkpoint, base, "--ckpt")
    family = attempt(family_for, checkpoint, None) if checkpoint else None
    for network in networks:
        file = NetworkFile(network.path, module or module_of(network.path))
        problems += network_problems(file, checkpoint, "network_weights")
    text = options.prompts or of_run("sample_prompts")
    if not text:
        problems.append("--prompts is needed: the run has no sample prompts")
    prompts = attempt(prompts_of, text) if text else None
    requests = [_request(prompt, options) for prompt in prompts or []]
    axes = [attempt(build_axis, text, f"--{flag}", networks, requests) if text else None
            for flag, text in _axes_of(options, requests).items()] if requests else []  # fmt: skip
    if problems:
        raise UserError(*problems)
    sampler = options.sampler or of_run("sample_sampler") or "ddim"
    folder = Path(options.output) if options.output else run.grid_folder if run else Path("grid")
    model = ModelOptions(
        pretrained_model_name_or_path=base,
        vae=options.vae or of_run("vae"),
        clip_skip=options.clip_skip or of_run("clip_skip"),
        v_parameterization=options.v_parameterization or bool(of_run("v_parameterization")),
        no_half_vae=bool(of_run("no_half_vae")),
    )
    given = [name for name in ("bf16", "fp16") if getattr(options, name)]
    precision = given[0] if given else of_run("mixed_precision") or "no"
    last = networks[-1] if networks else None
    first = Cell(last, options.strength, requests[0])
    title = run.name if run else "Grid"
    return GridPlan(title, checkpoint.path, family, model, module, precision, *axes, first, sampler, folder, networks)


def _axes_of(options: GridOptions, requests: list[PictureRequest]) -> dict[str, str | None]:
    kinds = {text.partition("=")[0].strip() for text in (options.x, options.y)}
    usual = "prompt" if len(requests) > 1 and "prompt" not in kinds else None
    return {"x": options.x, "y": options.y, "z": options.z or usual}


def _request(prompt: SamplePrompt, options: GridOptions) -> PictureRequest:
    """A sample prompt with what the flags say of all."""
    request = as_request(prompt, USUAL_SEED if options.seed is None else options.seed)
    changes = {"sample_steps": options.steps, "scale": options.scale, "sample_sampler": options.sampler}
    return replace(request, **{name: value for name, value in changes.items() if value is not None})


def as_request(prompt: SamplePrompt, seed: int) -> PictureRequest:
    """A sample prompt as a picture to draw; `seed` is for those without."""
    values = {name: getattr(prompt, name) for name in SamplePrompt.__dataclass_fields__}
    return PictureRequest(**{**values, "seed": seed if prompt.seed is None else prompt.seed})


def shared_notes(plan: GridPlan) -> list[str]:
    """What all pictures of a grid have in common."""
    varied = {axis.name for axis in plan.axes}
    request = plan.first.request
    facts = {
        "prompt": f"prompt: {request.prompt}",
        "seed": f"seed {request.seed}",
        "sampler": f"sampler {request.sample_sampler or plan.sampler}",
        "steps": f"{request.sample_steps} steps",
        "CFG scale": f"CFG scale {request.scale:g}",
        "strength": f"strength {plan.first.strength:g}",
    }
    if "prompt" in varied:  # which may have seeds and settings of their own
        facts = {name: text for name, text in facts.items() if name == "strength"}
    shown = [text for name, text in facts.items() if name not in varied]
    return [", ".join([*shown, f"base model {plan.base.name}"])]


def of_another_project(module: str | None) -> str | None:
    """A run's algorithm where it is none of ours: our files tell theirs, which AdaLoRA's say is LoRA."""
    return module if module and not module.startswith("networks.") else None
