"""The record that a run of training keeps of itself."""

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator

from library.options.derived import network_module
from library.options.groups import TrainNetworkOptions
from library.preflight import Preflight
from library.training.network_recipe import NetworkRecipe
from library.training.record import RunRecord
from library.training.run_facts import dataset_facts, device_name, model_fingerprints, most_memory, versions
from library.training.saving import LoopState


def recorded(
    options: TrainNetworkOptions, checked: Preflight, recipe: NetworkRecipe, accelerator: Accelerator, state: LoopState
) -> AbstractContextManager[None]:
    """A block of training whose record the main process writes."""
    if not accelerator.is_main_process:
        return nullcontext()
    parts = {"training": checked.scanned, "validation": checked.validation}
    facts = {
        "versions": versions(recipe.spec.path, network_module(options)),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "dataset": dataset_facts({use: part for use, part in parts.items() if part}, checked.repeats),
    }

    def model_facts() -> dict[str, object]:
        marks = model_fingerprints(recipe.metadata.hashes.fields_by_now(), checked.checkpoint.path)
        return marks | {"memory": most_memory(accelerator.device)}

    recipe.record = RunRecord(options, checked.plan, recipe.step_times, facts, model_facts)
    return recipe.record.kept(state)
