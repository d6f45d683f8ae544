"""Files of the GUI kohya_ss: its own JSON, in which zeros and empty texts mean "not given", and the TOML made of it."""

import shlex
from dataclasses import dataclass

from library.errors import UserError
from library.options.config_file import Given
from library.options.imports.translation import (
    NOT_SET,
    OTHER_MODELS,
    Answer,
    Argument,
    LeftOut,
    Renamed,
    Special,
    Translation,
    shown,
)

NAME = "kohya_ss"
_ACCELERATE = LeftOut("belongs to the launch: accelerate launch has an option for it")
_GUI = LeftOut("of the GUI, nothing to do with training")
_NO_TRAINER = LeftOut("train_network.py has no such option")
_OTHER_MODELS = LeftOut(OTHER_MODELS)
BLOCKS = (
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
)
DROPOUTS = ("rank_dropout", "module_dropout")
LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
CONVOLUTIONS = ("conv_dim", "conv_alpha")
LYCORIS = ("LyCORIS_preset", *CONVOLUTIONS, *DROPOUTS, *LORA_PLUS, "train_norm")
OFT = (*LYCORIS, "rank_dropout_scale", "use_tucker", "use_scalar", "rescaled")
PRODUCTS = (*LYCORIS, "rank_dropout_scale", "use_scalar", "bypass_mode", "dora_wd")
NETWORK_KEYS = (
    *BLOCKS, *DROPOUTS, *LORA_PLUS, *CONVOLUTIONS, "unit", "train_norm", "rank_dropout_scale", "use_tucker", "use_cp",
    "use_scalar", "rescaled", "bypass_mode", "dora_wd", "factor", "decompose_both",
)  # fmt: skip
SDXL_KEYS = {  # key -> flag
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}
KEYS: dict[str, Answer] = {
    "LoRA_type": Special("`network_module`, and `algo=` in `network_args`"),
    "LyCORIS_preset": Argument("network_args", "preset"),
    **{key: Argument("network_args", key) for key in NETWORK_KEYS},
    "train_on_input": LeftOut("LyCORIS does not read it, its presets decide"),
    "constrain": LeftOut("LyCORIS does not read it, its name there is constraint"),
    "conv_dims": LeftOut("sd-scripts does not read it, its name there is conv_block_dims"),
    "conv_alphas": LeftOut("sd-scripts does not read it, its name there is conv_block_alphas"),
    "additional_parameters": Special("flags of a command line, before the other keys"),
    "max_resolution": Renamed("resolution"),
    "optimizer": Renamed("optimizer_type"),
    "lora_network_weights": Renamed("network_weights"),
    "epoch": Special("`max_train_epochs`, unless that or `max_train_steps` is given"),
    "lr_warmup": Special("`lr_warmup_steps`; it is in percent of all steps"),
    "noise_offset_type": Special(
        "Original: `multires_noise_*` are left out; Multires: `noise_offset*`, `adaptive_noise_scale`"
    ),
    "sdxl": LeftOut("the checkpoint says which model is trained"),
    **{key: Special(f"`{flag}`, where `sdxl` is on") for key, flag in SDXL_KEYS.items()},
    "flux1_checkbox": _OTHER_MODELS,
    "flux1_cache_text_encoder_outputs": _OTHER_MODELS,
    "flux1_cache_text_encoder_outputs_to_disk": _OTHER_MODELS,
    "train_blocks": _OTHER_MODELS,
    "mem_eff_save": _OTHER_MODELS,
    "ae": _OTHER_MODELS,
    "clip_l": _OTHER_MODELS,
    "t5xxl": _OTHER_MODELS,
    "t5xxl_max_token_length": _OTHER_MODELS,
    "apply_t5_attn_mask": _OTHER_MODELS,
    "discrete_flow_shift": _OTHER_MODELS,
    "guidance_scale": _OTHER_MODELS,
    "model_prediction_type": _OTHER_MODELS,
    "split_mode": _OTHER_MODELS,
    "timestep_sampling": _OTHER_MODELS,
    "single_blocks_to_swap": _OTHER_MODELS,
    "double_blocks_to_swap": _OTHER_MODELS,
    "qwen_image_vae_2d": _OTHER_MODELS,
    "stop_text_encoder_training": _NO_TRAINER,
    "stop_text_encoder_training_pct": _NO_TRAINER,
    "no_token_padding": _NO_TRAINER,
    "lowvram": _NO_TRAINER,
    "train_inpainting": _NO_TRAINER,
    "show_timesteps": _NO_TRAINER,
    "show_timesteps_resolution": _NO_TRAINER,
    "use_wandb": _NO_TRAINER,
    "gpu_ids": LeftOut("choose GPUs with accelerate launch --gpu_ids, or with CUDA_VISIBLE_DEVICES"),
    "dynamo_mode": _ACCELERATE,
    "dynamo_use_dynamic": _ACCELERATE,
    "dynamo_use_fullgraph": _ACCELERATE,
    "extra_accelerate_launch_args": _ACCELERATE,
    "main_process_port": _ACCELERATE,
    "multi_gpu": _ACCELERATE,
    "num_cpu_threads_per_process": _ACCELERATE,
    "num_machines": _ACCELERATE,
    "num_processes": _ACCELERATE,
    "model_list": _GUI,
    "save_as_bool": _GUI,
}
# Keys that people and other tools write too.
SHARED = {
    *("epoch", "optimizer", "max_resolution", "lora_network_weights", "gpu_ids", "stop_text_encoder_training"),
    *("no_token_padding", "train_norm", "lowvram", "ae", "clip_l", "t5xxl", "t5xxl_max_token_length"),
    *("apply_t5_attn_mask", "discrete_flow_shift"),
    *("guidance_scale", "model_prediction_type", "split_mode", "timestep_sampling", "mem_eff_save", "train_inpainting"),
    *("single_blocks_to_swap", "double_blocks_to_swap", "show_timesteps", "show_timesteps_resolution"),
    *("train_blocks", "qwen_image_vae_2d", "use_wandb", *NETWORK_KEYS),
}
MARKS = KEYS.keys() - SHARED
PREFIXES_OF_OTHER_MODELS = ("flux1_", "sd3_", "lumina_", "anima_", "hunyuan_")
PART_RATES = {  # learning rate -> what its being 0 means
    "unet_lr": "network_train_text_encoder_only",
    "text_encoder_lr": "network_train_unet_only",
}
KEPT_ZEROS = ("max_data_loader_n_workers",)  # written whatever its value
SPLIT_AT_SPACES = ("optimizer_args", "lr_scheduler_args")
ATTENTION = {"xformers": "xformers", "true": "xformers", "sdpa": "sdpa"}
NOISE = {  # noise_offset_type -> keys that do not count
    "Original": ("multires_noise_iterations", "multires_noise_discount"),
    "Multires": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
}


@dataclass(frozen=True)
class NetworkType:
    """What kohya_ss starts for a `LoRA_type`, and the keys it hands on."""

    module: str
    keys: tuple[str, ...]
    algo: str | None = None


_LOCON = NetworkType("lycoris.kohya", (*PRODUCTS, "use_tucker"), "locon")
NETWORK_TYPES = {
    "Standard": NetworkType("networks.lora", (*BLOCKS, *DROPOUTS, *LORA_PLUS)),
    "Kohya LoCon": NetworkType("networks.lora", (*CONVOLUTIONS, *BLOCKS, *DROPOUTS, *LORA_PLUS)),
    "LoRA-FA": NetworkType("networks.lora_fa", (*BLOCKS, *DROPOUTS)),
    "Kohya DyLoRA": NetworkType("networks.dylora", (*CONVOLUTIONS, "unit", *LORA_PLUS)),
    "Flux1": NetworkType("networks.lora_flux", ()),
    "LoCon": _LOCON,
    "LyCORIS/LoCon": _LOCON,
    "LyCORIS/LoHa": NetworkType("lycoris.kohya", (*PRODUCTS, "use_tucker"), "loha"),
    "LyCORIS/LoKr": NetworkType("lycoris.kohya", (*PRODUCTS, "use_cp", "factor", "decompose_both"), "lokr"),
    "LyCORIS/iA3": NetworkType("lycoris.kohya", ("LyCORIS_preset", *CONVOLUTIONS), "ia3"),
    "LyCORIS/DyLoRA": NetworkType("lycoris.kohya", (*LYCORIS, "use_tucker", "unit"), "dylora"),
    "LyCORIS/GLoRA": NetworkType("lycoris.kohya", (*LYCORIS, "rank_dropout_scale"), "glora"),
    "LyCORIS/Diag-OFT": NetworkType("lycoris.kohya", OFT, "diag-oft"),
    "LyCORIS/BOFT": NetworkType("lycoris.kohya", OFT, "boft"),
    "LyCORIS/Native Fine-Tuning": NetworkType(
        "lycoris.kohya",
        ("LyCORIS_preset", *DROPOUTS, "rank_dropout_scale", "use_tucker", "use_scalar", "train_norm"),
        "full",
    ),
}


def count_marks(given: dict[str, Given]) -> int:
    """How many signs there are that kohya_ss wrote the file."""
    return len(MARKS & given.keys())


def apply_rules(translation: Translation) -> None:
    """What kohya_ss does to more than one key at a time before it starts sd-scripts."""
    _read_command_line(translation)
    if "LoRA_type" in translation.given or "network_module" not in translation.given:  # not the TOML that it makes
        _choose_network(translation)
        _choose_parts(translation)
    _choose_attention(translation)
    _choose_noise(translation)
    _choose_length(translation)
    for key, flag in SDXL_KEYS.items():
        if translation.is_on("sdxl") and translation.is_on(key):
            translation.become(key, flag, True)
        else:
            translation.leave_out(key, "counts only with sdxl = true")
    if not translation.is_on("flux1_checkbox"):
        translation.leave_out("fp8_base_unet", "counts only with flux1_checkbox = true")
    for key in SPLIT_AT_SPACES:
        if isinstance(translation.value(key), str):
            entry = translation.given[key]
            translation.given[key] = Given(entry.value.replace('"', "").split(), entry.source)
    _drop_zeros(translation)


def _read_command_line(translation: Translation) -> None:
    """`additional_parameters` are flags; a backslash is a part of a path, not an escape."""
    entry = translation.given.pop("additional_parameters", None)
    if entry is None or not str(entry.value).strip():
        return
    lexer = shlex.shlex(str(entry.value), posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError:
        raise UserError(f"{entry.source}: additional_parameters has a quotation mark without its partner") from None
    translation.command_line = Given(words, entry.source)
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    translation.changes.append(f"additional_parameters -> {' '.join(names)}")


def _choose_network(translation: Translation) -> None:
    """Module, algorithm and arguments of the network from `LoRA_type`; keys that its type has no use for go."""
    name = translation.value("LoRA_type") or "Standard"
    if name not in NETWORK_TYPES:
        place = translation.given["LoRA_type"].source
        raise UserError(f"{place}: LoRA_type {name} is not known; known are {', '.join(NETWORK_TYPES)}")
    chosen = NETWORK_TYPES[name]
    for key in (*NETWORK_KEYS, "LyCORIS_preset"):
        if key not in chosen.keys:
            translation.leave_out(key, f"LoRA_type {name} does not take it")
        elif key in translation.given and key not in CONVOLUTIONS and _is_zero(translation.value(key)):
            translation.leave_out(key, NOT_SET)
    if chosen.algo == "dylora" and "unit" in translation.given:
        translation.add_argument("unit", "network_args", "block_size")
    if "LoRA_type" in translation.given:
        source = translation.given["LoRA_type"].source
        translation.become("LoRA_type", "network_module", chosen.module)
        if chosen.algo:
            translation.add_item("network_args", f"algo={chosen.algo}", "LoRA_type", source)


def _choose_parts(translation: Translation) -> None:
    """A learning rate of 0 leaves its part out; where both are 0, `learning_rate` is that of both."""
    zeros = [key for key in PART_RATES if _is_zero(translation.value(key, 0))]
    if len(zeros) == 2 and "learning_rate" in translation.given and _is_zero(translation.value("learning_rate")):
        place = translation.given["learning_rate"].source
        raise UserError(f"{place}: learning_rate, unet_lr and text_encoder_lr leave nothing to train: all are 0")
    for key in zeros:
        if len(zeros) == 1 and key in translation.given:
            translation.become(key, PART_RATES[key], True)


def _choose_attention(translation: Translation) -> None:
    """`xformers` is a switch in old files, and a choice of three in new ones."""
    if isinstance(translation.value("xformers"), str):
        chosen = ATTENTION.get(translation.value("xformers").lower())
        if chosen:
            translation.become("xformers", chosen, True)
        else:
            translation.leave_out("xformers", "PyTorch's own attention is used")


def _choose_noise(translation: Translation) -> None:
    kind = translation.value("noise_offset_type") or "Original"
    for key in NOISE.get(kind, ()):
        if not _is_zero(translation.value(key)):
            translation.leave_out(key, f"noise_offset_type is {kind}")
        translation.given.pop(key, None)
    translation.given.pop("noise_offset_type", None)


def _choose_length(translation: Translation) -> None:
    """Epochs, where neither `max_train_epochs` nor `max_train_steps` counts; what is relative to the length."""
    epochs, stronger = translation.number("epoch"), ("max_train_epochs", "max_train_steps")
    restarts = translation.value("lr_scheduler") == "cosine_with_restarts"
    if restarts and epochs and translation.value("lr_scheduler_num_cycles") == "":
        translation.become("lr_scheduler_num_cycles", "lr_scheduler_num_cycles", int(epochs))
    counts_steps = not translation.value("dataset_config")
    if given := [key for key in stronger if translation.number(key)]:
        translation.leave_out("epoch", f"{given[0]} is given")
    elif epochs and counts_steps:
        for key in stronger:
            translation.given.pop(key, None)
        translation.become("epoch", "max_train_epochs", translation.value("epoch"))
    elif epochs:
        translation.leave_out("epoch", "kohya_ss does not count steps of a dataset_config")
    if translation.number("lr_warmup_steps"):
        translation.leave_out("lr_warmup", "lr_warmup_steps is given")
    elif (percent := translation.number("lr_warmup")) and (counts_steps or "max_train_steps" in given):
        translation.become("lr_warmup", "lr_warmup_steps", f"{percent:g}%")
    elif percent:
        translation.leave_out("lr_warmup", "kohya_ss does not count steps of a dataset_config")


def _drop_zeros(translation: Translation) -> None:
    """kohya_ss hands on no zeros and empty texts, so that the default counts, which is not always 0."""
    for key, entry in list(translation.given.items()):
        flag = translation.flags.get(key)
        if key in KEPT_ZEROS:
            continue
        if not _is_zero(entry.value, is_text=flag is not None and flag.kind in ("str", "path")):
            if key not in KEYS and key.startswith(PREFIXES_OF_OTHER_MODELS):
                translation.leave_out(key, OTHER_MODELS)
        elif flag is None:
            translation.leave_out(key, NOT_SET)
        else:
            del translation.given[key]
            if flag.default and entry.value != "":
                reason = f"kohya_ss hands on no {shown(entry.value)}: the default, {flag.default}, counts"
                translation.left_out.setdefault(reason, []).append(key)


def _is_zero(value: object, is_text: bool = False) -> bool:
    """Whether kohya_ss takes a value for "not given"; as text "0" is one too, unless the option is a text."""
    if isinstance(value, str) and value.strip() and not is_text:
        try:
            return float(value) == 0
        except ValueError:
            return False
    return value in ("", None, [], 0)
