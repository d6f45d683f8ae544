"""Files of lora-scripts: the keys of its pages, which its web page turns into sd-scripts' own, and its presets."""

from typing import Any

from library.errors import UserError
from library.options.config_file import Given, parse_toml
from library.options.imports.translation import (
    NOT_SET,
    OTHER_MODELS,
    Answer,
    Argument,
    LeftOut,
    Renamed,
    Special,
    Translation,
    as_list,
)

NAME = "lora-scripts"
_PROMPT = Special("a part of the prompt in `sample_prompts`")
_FULL_TRAINING = LeftOut("for full fine-tuning")
KEYS: dict[str, Answer] = {
    "model_train_type": LeftOut("the checkpoint says which model is trained"),
    "lr_restart_cycles": Renamed("lr_scheduler_num_cycles"),
    "network_args_custom": Special("items of `network_args`"),
    "optimizer_args_custom": Special("items of `optimizer_args`"),
    "lycoris_algo": Argument("network_args", "algo"),
    "conv_dim": Argument("network_args", "conv_dim"),
    "conv_alpha": Argument("network_args", "conv_alpha"),
    "dropout": Argument("network_args", "dropout"),
    "train_norm": Argument("network_args", "train_norm"),
    "lokr_factor": Argument("network_args", "factor"),
    "dylora_unit": Argument("network_args", "unit"),
    "down_lr_weight": Argument("network_args", "down_lr_weight"),
    "mid_lr_weight": Argument("network_args", "mid_lr_weight"),
    "up_lr_weight": Argument("network_args", "up_lr_weight"),
    "block_lr_zero_threshold": Argument("network_args", "block_lr_zero_threshold"),
    "enable_block_weights": Special("a switch, see `down_lr_weight`"),
    "enable_base_weight": Special("a switch, see `base_weights`"),
    "prodigy_d0": Argument("optimizer_args", "d0"),
    "prodigy_d_coef": Argument("optimizer_args", "d_coef"),
    "enable_preview": Special("a switch, see `sample_prompts`"),
    "prompt_file": Special("`sample_prompts`, instead of all other prompts"),
    "positive_prompts": _PROMPT,
    "negative_prompts": _PROMPT,
    "sample_width": _PROMPT,
    "sample_height": _PROMPT,
    "sample_cfg": _PROMPT,
    "sample_seed": _PROMPT,
    "sample_steps": _PROMPT,
    "randomly_choice_prompt": LeftOut("previews are of positive_prompts, not of a caption picked at random"),
    "ui_custom_params": Special("TOML lines that go before the other keys"),
    "gpu_ids": LeftOut("choose GPUs with accelerate launch --gpu_ids, or with CUDA_VISIBLE_DEVICES"),
    "train_t5xxl": LeftOut(OTHER_MODELS),
    "cfg_trunc": LeftOut(OTHER_MODELS),
    "renorm_cfg": LeftOut(OTHER_MODELS),
    "stop_text_encoder_training": _FULL_TRAINING,
    "learning_rate_te": _FULL_TRAINING,
    "learning_rate_te1": _FULL_TRAINING,
    "learning_rate_te2": _FULL_TRAINING,
    "learning_rate_te3": _FULL_TRAINING,
    "no_token_padding": _FULL_TRAINING,
}
# Keys that nobody else writes, or that others write too (kohya_ss, or people for sd-scripts' other trainers).
SHARED = {
    *("lr_restart_cycles", "conv_dim", "conv_alpha", "dropout", "train_norm", "gpu_ids", "block_lr_zero_threshold"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "stop_text_encoder_training", "no_token_padding"),
    *("train_t5xxl", "cfg_trunc", "renorm_cfg"),
    *("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3"),
}
MARKS = KEYS.keys() - SHARED

# key -> the key and value without which lora-scripts leaves it out
ONLY_WITH: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(
        ("lycoris_algo", "conv_dim", "conv_alpha", "dropout", "train_norm"), ("network_module", "lycoris.kohya")
    ),
    "lokr_factor": ("lycoris_algo", "lokr"),
    "dylora_unit": ("network_module", "networks.dylora"),
    **dict.fromkeys(
        ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"), ("enable_block_weights", True)
    ),
    **dict.fromkeys(("base_weights", "base_weights_multiplier"), ("enable_base_weight", True)),
    **dict.fromkeys(("prodigy_d0", "prodigy_d_coef"), ("optimizer_type", "Prodigy")),
    **dict.fromkeys(
        (
            *("sample_prompts", "sample_sampler", "sample_every_n_epochs", "sample_every_n_steps", "sample_at_first"),
            *("prompt_file", "randomly_choice_prompt"),
            *(key for key, answer in KEYS.items() if answer is _PROMPT),
        ),
        ("enable_preview", True),
    ),
}
# key -> letter of the prompt line, and what lora-scripts takes where the key is missing
PROMPT_OPTIONS = {
    "negative_prompts": ("n", ""),
    "sample_width": ("w", 512),
    "sample_height": ("h", 512),
    "sample_cfg": ("l", 7),
    "sample_seed": ("d", 2333),
    "sample_steps": ("s", 24),
}
PRESET_KEYS = {"name", "version", "author", "train_type", "description"}
SWITCHES = ("enable_block_weights", "enable_base_weight", "enable_preview")
PRODIGY_ARGUMENTS = ("decouple=True", "weight_decay=0.01", "use_bias_correction=True")
DADAPT_ARGUMENTS = ("decouple=True", "weight_decay=0.01")  # for DAdaptation and DAdaptAdam


def count_marks(given: dict[str, Given]) -> int:
    """How many signs there are that lora-scripts wrote the file."""
    return len(MARKS & given.keys()) + is_preset(given)


def is_preset(given: dict[str, Given]) -> bool:
    """Whether the file has the two tables of a preset, and nothing but its description in the first."""
    tables = {entry.table for entry in given.values()}
    described = {key for key, entry in given.items() if entry.table == "metadata"}
    return {"metadata", "data"} <= tables and described <= PRESET_KEYS


def apply_rules(translation: Translation) -> None:
    """What lora-scripts does to more than one key at a time before it starts sd-scripts."""
    if is_preset(translation.given):
        for key in [key for key, entry in translation.given.items() if entry.table == "metadata"]:
            translation.leave_out(key, "describes the preset")
    _add_custom_lines(translation)
    for key in [key for key in ONLY_WITH if key in translation.given]:
        if not _counts(translation, key):
            switch, wanted = ONLY_WITH[key]
            translation.leave_out(key, f"counts only with {switch} = {str(wanted).replace('True', 'true')}")
    _make_prompt(translation)
    _add_optimizer_arguments(translation)
    for key, flag in (("network_args_custom", "network_args"), ("optimizer_args_custom", "optimizer_args")):
        _append_items(translation, key, flag)
    for key in ("base_weights", "base_weights_multiplier"):
        if key in translation.given:
            entry = translation.given[key]
            translation.given[key] = Given(as_list(entry.value) or entry.value, entry.source)
    for switch in SWITCHES:
        if translation.is_on(switch):
            del translation.given[switch]  # what it switches on is there to see
        else:
            translation.leave_out(switch, NOT_SET)


def _counts(translation: Translation, key: str) -> bool:
    """Whether the switch of a key is on, and its own switch in turn; one that is not there is taken to be on."""
    if key not in ONLY_WITH:
        return True
    switch, wanted = ONLY_WITH[key]
    found = translation.value(switch, wanted)
    return str(found).lower() == str(wanted).lower() and _counts(translation, switch)


def _add_custom_lines(translation: Translation) -> None:
    """`ui_custom_params` is TOML that goes before what the pages say."""
    entry = translation.given.pop("ui_custom_params", None)
    if entry is None or not str(entry.value).strip():
        return
    try:
        values = parse_toml("ui_custom_params", str(entry.value))
    except UserError as error:
        raise UserError(*(f"{entry.source}: {problem}" for problem in error.problems)) from None
    translation.given |= {key: Given(value, entry.source) for key, value in values.items()}
    translation.changes.append(f"ui_custom_params -> {', '.join(values)}")


def _make_prompt(translation: Translation) -> None:
    """The prompt of the previews from the keys of the page, or the file that it names instead."""
    if path := str(translation.value("prompt_file", "")).strip():
        translation.become("prompt_file", "sample_prompts", path)
        reason = "prompt_file is given"
    elif prompt := " ".join(str(translation.value("positive_prompts", "")).split()):
        parts = [prompt]
        for key, (letter, default) in PROMPT_OPTIONS.items():
            value = " ".join(str(translation.value(key, default)).split())
            parts += [f"--{letter} {value}"] if value else []
        translation.become("positive_prompts", "sample_prompts", " ".join(parts))
        reason = ""
    else:
        reason = "there is no positive_prompts"
    for key in ("positive_prompts", *PROMPT_OPTIONS):
        if reason:
            translation.leave_out(key, reason)
        else:
            translation.given.pop(key, None)


def _add_optimizer_arguments(translation: Translation) -> None:
    """What the page adds for optimizers that find their own learning rate."""
    optimizer = str(translation.value("optimizer_type", ""))
    arguments: tuple[str, ...] = ()
    if optimizer.lower() == "prodigy" and {"prodigy_d0", "prodigy_d_coef"} & translation.given.keys():
        warmup = ("safeguard_warmup=True",) if translation.number("lr_warmup_steps") else ()
        arguments = (*PRODIGY_ARGUMENTS, *warmup)
    elif optimizer.lower().startswith("dada"):
        arguments = DADAPT_ARGUMENTS if optimizer in ("DAdaptation", "DAdaptAdam") else ()
        _set_rates_to_one(translation)
    for item in arguments:
        translation.add_item("optimizer_args", item, "optimizer_type", translation.given["optimizer_type"].source)


def _set_rates_to_one(translation: Translation) -> None:
    rates = ("learning_rate", "unet_lr", "text_encoder_lr")
    if any(translation.number(key) != 1 for key in rates):
        source = translation.given["optimizer_type"].source
        translation.given |= {key: Given(1.0, source) for key in rates}
        name = translation.value("optimizer_type")
        translation.changes.append(f"optimizer_type = {name} -> {' = '.join(rates)} = 1")


def _append_items(translation: Translation, key: str, flag: str) -> None:
    """The lines of a list that the user wrote go after all others."""
    entry = translation.given.pop(key, None)
    items = as_list(entry.value) if entry else []
    if items:
        own = translation.given.get(flag)
        listed = as_list(own.value) if own else []
        translation.given[flag] = Given([*listed, *items], own.source if own else entry.source)
        translation.changes.append(f"{key} -> {flag} {' '.join(map(str, items))}")
