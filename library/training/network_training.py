"""Training an adapter network, from checked options to the file: the recipe of train_network.py and its kin."""

import importlib
import logging
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.contrib.logging import logging_redirect_tqdm

from library.dataset.dataset import TrainingDataset
from library.errors import UserError
from library.families import family_class
from library.families.base import AdapterTarget, Batch, ModelFamily
from library.options.derived import caches_latents, learning_rates, network_arguments
from library.options.groups import TrainNetworkOptions
from library.preflight import Preflight
from library.training import saving
from library.training.caching import cache_latents
from library.training.denoising import Ddpm, denoising_loss
from library.training.loop import run
from library.training.metadata import TrainingMetadata
from library.training.optimizers import OptimizerSpec, build_optimizer
from library.training.plan import StepPlan, save_every_n_epochs
from library.training.precision import build_accelerator, choose_attention, full_dtype, save_dtype, weight_dtype
from library.training.reports import TrainedPart, parts_table
from library.training.sampling import before_after_sheet, save_samples, write_picture
from library.training.saving import LoopState, OutputNames
from library.training.schedulers import build_scheduler

logger = logging.getLogger(__name__)

DEFAULT_NETWORK = "networks.lora"


def train_network(options: TrainNetworkOptions, checked: Preflight) -> Path:
    """Train and return the path of the network's file."""
    algorithm = importlib.import_module(options.network_module or DEFAULT_NETWORK)
    arguments = network_arguments(options)
    algorithm.check_arguments(arguments)
    state = first_state(options, checked.plan)
    accelerator = build_accelerator(options)
    set_seed(state.seed)

    family = family_class(checked.family)(options, accelerator.device, weight_dtype(options))
    choose_attention(family.unet, options, accelerator.device)
    dataset = TrainingDataset(checked.scanned, options, state.seed, checked.plan.max_train_steps)
    if caches_latents(options):
        cache_latents(dataset, family, options, accelerator.is_local_main_process)
        family.release_vae()

    network = build_network(algorithm, family, options, arguments).to(accelerator.device, full_dtype(options))
    groups = network.param_groups(*learning_rates(options))
    family.trains_text_encoder = any(group["name"].startswith("textencoder") for group in groups)
    optimizer, spec, optimizer_name = build_optimizer(options, groups)
    plan = checked.plan
    scheduler = build_scheduler(options, optimizer, spec, plan.max_train_steps, plan.num_processes)
    network, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)
    network = accelerator.unwrap_model(network)
    if options.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    if options.resume:
        saving.load_state(accelerator, Path(options.resume))
        logger.info("going on from step %d of epoch %d", state.step, state.epoch)
    else:
        torch.manual_seed(state.seed + accelerator.process_index)  # processes draw different noise

    metadata = TrainingMetadata(
        options, family.metadata(), dataset, optimizer_name, plan.max_train_steps, plan.num_epochs, plan.num_processes
    )
    recipe = NetworkRecipe(family, network, optimizer, spec, groups, accelerator, options, metadata, checked)
    if accelerator.is_main_process:
        print(parts_table(trained_parts(network, groups)), flush=True)
    start_trackers(accelerator, options)
    recipe.sample_at_first(state)
    sampler = dataset.sampler(options.train_batch_size, plan.accumulation, plan.num_processes)
    with logging_redirect_tqdm():
        state = run(recipe, dataset, sampler, optimizer, scheduler, accelerator, options, plan, state)
    path = recipe.finish(state)
    accelerator.end_training()
    return path


def first_state(options: TrainNetworkOptions, plan: StepPlan) -> LoopState:
    """Where training starts: at the beginning, at --initial_step or --initial_epoch, or where --resume left off."""
    if options.resume:
        state = saving.read_state(Path(options.resume))
        if state.step >= plan.max_train_steps:
            raise UserError(
                f"--resume: the state is at step {state.step} and training ends at {plan.max_train_steps}; "
                "give a larger --max_train_epochs or --max_train_steps"
            )
        return at_batch_start(state, plan)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    step = options.initial_step or 0
    if options.initial_step is None and options.initial_epoch is not None:
        step = (options.initial_epoch - 1) * plan.steps_per_epoch
    if step >= plan.max_train_steps:
        raise UserError(f"--initial_step {step} is not before the last step, {plan.max_train_steps}")
    epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
    return LoopState(epoch + 1, step, step_in_epoch * plan.accumulation, seed)


def at_batch_start(state: LoopState, plan: StepPlan) -> LoopState:
    """The same place, told as the beginning of the next epoch where the running one is finished."""
    if state.batch >= plan.batches_per_process:
        return LoopState(state.epoch + 1, state.step, 0, state.seed)
    return state


def build_network(algorithm, family: ModelFamily, options: TrainNetworkOptions, arguments: dict[str, str]) -> nn.Module:
    """The network on the layers that are to be trained, attached, with --network_weights where given."""
    targets = wanted_targets(family.adapter_targets(conv=algorithm.wants_convolutions(arguments)), options)
    network = algorithm.create_network(
        targets, options.network_dim, options.network_alpha, options.network_dropout, **arguments
    )
    if options.network_weights:
        network.load_weights(Path(options.network_weights))
    network.apply_to()
    return network


def wanted_targets(targets, options: TrainNetworkOptions) -> list[AdapterTarget]:
    """Without the parts that the user does not train."""
    if options.network_train_unet_only:
        return [target for target in targets if target.part == "unet"]
    if options.network_train_text_encoder_only:
        return [target for target in targets if target.part != "unet"]
    return list(targets)


def trained_parts(network: nn.Module, groups: list[dict]) -> list[TrainedPart]:
    """Rows of the table: every part with what the optimizer does with it."""
    rows = []
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    parts = {"text encoder": ("te", "te1", "te2"), "U-Net": ("unet",)}
    for name, keys in parts.items():
        adapters = [adapter for adapter in network.adapters() if adapter.part in keys]
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
        rate = next((rates[id(p)] for p in parameters if id(p) in rates), None)
        rows.append(TrainedPart(name, len(adapters), sum(p.numel() for p in parameters), rate))
    return rows


def start_trackers(accelerator: Accelerator, options: TrainNetworkOptions) -> None:
    if options.logging_dir:
        config = {"learning_rate": options.learning_rate} if options.log_config else None
        accelerator.init_trackers(options.log_tracker_name or "network_train", config)


class NetworkRecipe:
    """What the loop asks of a run that trains a network: its loss, and what to write when."""

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        optimizer: Optimizer,
        spec: OptimizerSpec,
        groups: list[dict],
        accelerator: Accelerator,
        options: TrainNetworkOptions,
        metadata: TrainingMetadata,
        checked: Preflight,
    ):
        self.family, self.network, self.optimizer, self.spec = family, network, optimizer, spec
        self.accelerator, self.options, self.metadata = accelerator, options, metadata
        self.prompts, self.plan = checked.prompts, checked.plan
        self.objective = Ddpm(options, v_prediction=options.v_parameterization, device=accelerator.device)
        self.names = OutputNames(options)
        self.group_names = [group["name"] for group in groups]
        self.every_n_epochs = save_every_n_epochs(options, self.plan.num_epochs)

    def loss(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return denoising_loss(self.family, self.objective, batch).mean()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def learning_rates(self) -> dict[str, float]:
        rates = {}
        for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True):
            rates[name] = group["lr"]
            if self.spec.adapts_lr and "d" in group:
                rates[f"d*lr/{name}"] = group["d"] * group["lr"]
        return rates

    def training_mode(self) -> None:
        self.network.train()
        if self.spec.schedule_free:
            self.optimizer.train()

    def resting_mode(self) -> None:
        """As the network is saved and sampled: no dropout, and a schedule-free optimizer's averaged weights."""
        self.network.eval()
        if self.spec.schedule_free:
            self.optimizer.eval()

    def step_finished(self, state: LoopState) -> None:
        options = self.options
        if options.sample_every_n_epochs is None and due(options.sample_every_n_steps, state.step):
            self.sample(f"{state.step:06d}")
        every = options.save_every_n_steps
        if due(every, state.step):
            self.save(self.names.step(state.step), state, epoch=state.epoch - 1)
            self.remove(self.names.step, saving.step_to_remove, state.step, every, "steps")

    def epoch_finished(self, state: LoopState) -> None:
        if due(self.options.sample_every_n_epochs, state.epoch):
            self.sample(f"e{state.epoch:06d}")
        if due(self.every_n_epochs, state.epoch) and state.epoch < self.plan.num_epochs:
            self.save(self.names.epoch(state.epoch), state, epoch=state.epoch)
            self.remove(self.names.epoch, saving.epoch_to_remove, state.epoch, self.every_n_epochs, "epochs")

    def remove(self, name_of, which, now: int, every: int, unit: str) -> None:
        """Remove the checkpoint and the state that have become too old."""
        if not self.accelerator.is_main_process:
            return
        keep = getattr(self.options, f"save_last_n_{unit}")
        keep_state = getattr(self.options, f"save_last_n_{unit}_state") or keep
        gone, gone_state = which(now, every, keep), which(now, every, keep_state)
        if gone is not None:
            saving.remove_checkpoint(name_of(gone))
        if gone_state is not None:
            saving.remove_state(self.names.state_of(name_of(gone_state)))

    def save(self, path: Path, state: LoopState, epoch: int, with_state: bool | None = None) -> None:
        """Write the network, and the state where it is wanted; `epoch` as the metadata counts it."""
        self.resting_mode()
        if self.accelerator.is_main_process:
            dtype = save_dtype(self.options.save_precision)
            self.network.save_weights(path, dtype, self.metadata.at(state.step, epoch))
            logger.info("saved: %s", path)
        if self.options.save_state if with_state is None else with_state:
            saving.save_state(self.accelerator, self.names.state_of(path), state)

    def sample_at_first(self, state: LoopState) -> None:
        if self.options.sample_at_first and self.prompts and state.step == 0:
            self.sample("e000000")

    def sample(self, when: str) -> None:
        """Draw the sample prompts on the main process."""
        if not self.prompts or not self.accelerator.is_main_process:
            return
        self.resting_mode()
        folder = self.names.folder / "sample"
        save_samples(self.family, self.prompts, self.options.sample_sampler, folder, self.options.output_name, when)
        self.release_vae()

    def release_vae(self) -> None:
        if caches_latents(self.options):
            self.family.release_vae()

    def finish(self, state: LoopState) -> Path:
        """The last file, its state, the before-and-after picture, and where to put it all."""
        path = self.names.final()
        options = self.options
        self.save(path, state, self.plan.num_epochs, with_state=options.save_state or options.save_state_on_train_end)
        if self.accelerator.is_main_process:
            self.check_file(path)
            if options.before_after:
                self.write_before_after()
        return path

    def write_before_after(self) -> None:
        path = self.names.folder / "before_after.png"
        sheet = before_after_sheet(self.family, self.network, self.prompts, self.options.sample_sampler)
        write_picture(path, sheet)
        logger.info("the sample prompts without and with the network: %s", path)

    def check_file(self, path: Path) -> None:
        """Read the file back: every key must belong to a layer of the model, and the weights must be finite."""
        num_layers = self.network.check_saved(path)
        logger.info("%s was read back: all %d layers match the model", path, num_layers)
        logger.info(
            "To use it, put it into models/Lora of the Stable Diffusion WebUI or models/loras of ComfyUI; "
            "in the WebUI the prompt then has <lora:%s:1>",
            path.stem,
        )


def due(every: int | None, count: int) -> bool:
    return bool(every) and count % every == 0
