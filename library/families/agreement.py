"""Where the flags and the files of a base model tell different things of it. Needs no torch."""

import json

from library.families.detect import CheckpointInfo
from library.options.groups import TrainNetworkOptions

NUM_TEXT_ENCODERS = {"sd1": 1, "sd2": 1, "sdxl": 2}  # by kind of checkpoint


def model_warnings(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> list[str]:
    """A sentence for each thing that the user says of the base model and its files do not."""
    warnings = [
        version_warning(options, checkpoint),
        prediction_warning(options, checkpoint),
        rates_warning(options, checkpoint),
    ]
    if checkpoint.kind == "sd2" and options.clip_skip is not None:
        warnings.append(
            "--clip_skip is seldom right with Stable Diffusion 2.x: its text encoder is without its last layer already"
        )
    if checkpoint.kind == "sdxl" and options.clip_skip is not None:
        warnings.append("--clip_skip has no effect: Stable Diffusion XL always takes the layer before the last")
    if checkpoint.is_folder and options.disable_mmap_load_safetensors:
        warnings.append("--disable_mmap_load_safetensors has no effect on a diffusers folder, but on single files")
    return [warning for warning in warnings if warning]


def version_warning(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> str | None:
    """--v2 against the checkpoint's header, which goes first."""
    if options.v2 == (checkpoint.kind == "sd2"):
        return None
    what = "is given" if options.v2 else "is not given"
    return f"--v2 {what}, but {checkpoint.path} is a {checkpoint.description}; it is trained as what it is"


def prediction_warning(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> str | None:
    """--v_parameterization against a diffusers folder's scheduler; the flag goes first, a single file cannot tell."""
    predicts_v = folder_predicts_v(checkpoint)
    if predicts_v is None or predicts_v == options.v_parameterization:
        return None
    what, truth = ("is given", "noise") if options.v_parameterization else ("is not given", "velocity (v)")
    return (
        f"--v_parameterization {what}, but the scheduler of {checkpoint.path} says that the model predicts {truth}; "
        "training follows the flag"
    )


def rates_warning(options: TrainNetworkOptions, checkpoint: CheckpointInfo) -> str | None:
    """More learning rates than the model has text encoders."""
    count, given = NUM_TEXT_ENCODERS[checkpoint.kind], options.text_encoder_lr or []
    if len(given) <= count:
        return None
    encoders, which = ("one text encoder", "one counts") if count == 1 else (f"{count} text encoders", f"{count} count")
    return f"--text_encoder_lr has {len(given)} values, and the model {encoders}: the first {which}"


def folder_predicts_v(checkpoint: CheckpointInfo) -> bool | None:
    """Whether a diffusers folder's scheduler is for velocity; None where there is nothing that tells."""
    path = checkpoint.path / "scheduler" / "scheduler_config.json"
    if not checkpoint.is_folder or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return config.get("prediction_type", "epsilon") == "v_prediction" if isinstance(config, dict) else None
