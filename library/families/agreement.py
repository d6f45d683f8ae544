"""Where the flags and the files of a base model tell different things of it. Needs no torch."""

import re
from typing import Any

from library.errors import UserError
from library.families import row_of_kind
from library.families.detect import SD2_TEXT_LAYERS, CheckpointInfo, read_shapes
from library.options.groups import ModelOptions, PrecisionOptions, TrainNetworkOptions
from library.texts import read_json

TEXT_LAYER = re.compile(  # of the text encoder of Stable Diffusion 1.x or 2.x in a single file
    r"cond_stage_model\.(?:transformer\.(?:text_model\.)?encoder\.layers|model\.transformer\.resblocks)\.(\d+)\."
)


def check_clip_skip(options: ModelOptions, checkpoint: CheckpointInfo) -> None:
    """UserError where --clip_skip goes beyond the first layer of the text encoder."""
    if options.clip_skip is None or row_of_kind(checkpoint.kind) is None or text_layer(checkpoint):
        return
    num_layers = num_text_layers(checkpoint)
    if num_layers and options.clip_skip > num_layers:
        raise UserError(
            f"--clip_skip must be at most {num_layers}, the number of layers of the text encoder of {checkpoint.path}, "
            f"got {options.clip_skip}"
        )


def check_blocks_to_swap(options: PrecisionOptions, checkpoint: CheckpointInfo) -> None:
    """UserError where --blocks_to_swap is more than there are."""
    row = row_of_kind(checkpoint.kind)
    if row and (options.blocks_to_swap or 0) > row.num_blocks:
        raise UserError(
            f"--blocks_to_swap must be at most {row.num_blocks}, the blocks of the U-Net of a "
            f"{checkpoint.description}, got {options.blocks_to_swap}"
        )


def num_text_layers(checkpoint: CheckpointInfo) -> int | None:
    """The layers of the text encoder as it is trained with; None where the checkpoint does not tell."""
    if checkpoint.is_folder:
        return config_value(checkpoint, "text_encoder/config.json", "num_hidden_layers")
    names = read_shapes(checkpoint.path, "--pretrained_model_name_or_path")
    layers = {int(match[1]) for name in names if (match := TEXT_LAYER.match(name))}
    return min(len(layers), SD2_TEXT_LAYERS) if checkpoint.kind == "sd2" else len(layers)


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
    if options.clip_skip is not None and (always := text_layer(checkpoint)):
        warnings.append(f"--clip_skip has no effect: with a {checkpoint.description} it is always {always}")
    if checkpoint.is_folder and options.disable_mmap_load_safetensors:
        warnings.append("--disable_mmap_load_safetensors has no effect on a diffusers folder, but on single files")
    return [warning for warning in warnings if warning]


def text_layer(checkpoint: CheckpointInfo) -> str | None:
    """Which layer of the text encoders is taken, in words, where no option chooses it."""
    return row_of_kind(checkpoint.kind).text_layer


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
    count, given = row_of_kind(checkpoint.kind).num_text_encoders, options.text_encoder_lr or []
    if len(given) <= count:
        return None
    encoders, which = ("one text encoder", "one counts") if count == 1 else (f"{count} text encoders", f"{count} count")
    return f"--text_encoder_lr has {len(given)} values, and the model {encoders}: the first {which}"


def folder_predicts_v(checkpoint: CheckpointInfo) -> bool | None:
    """Whether a diffusers folder's scheduler is for velocity; None where there is nothing that tells."""
    prediction = config_value(checkpoint, "scheduler/scheduler_config.json", "prediction_type", "epsilon")
    return None if prediction is None else prediction == "v_prediction"


def config_value(checkpoint: CheckpointInfo, name: str, key: str, default: Any = None) -> Any:
    """What a JSON file of a diffusers folder says of a key; None where there is no such file that can be read."""
    path = checkpoint.path / name
    if not checkpoint.is_folder or not path.is_file():
        return None
    try:
        config = read_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return config.get(key, default) if isinstance(config, dict) else None
