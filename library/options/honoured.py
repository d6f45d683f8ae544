"""Options that are accepted but not, or not yet, acted on; those that change what is trained are refused."""

from typing import Any

from library.options.fields import flags_of

_NO_DDP = "gradients are averaged without DistributedDataParallel"
_NO_UPLOAD = "files stay on this computer"
_NO_WANDB = "curves are written for TensorBoard only"
_NO_VALIDATION = "no validation loss is computed"
_NO_DEEPSPEED = "it belongs to --deepspeed, which is not supported"

# flag -> what happens instead
NOT_HONOURED: dict[str, str] = {
    "in_json": "captions come from files beside the pictures",
    "dataset_class": "the built-in dataset is the only one",
    "dataset_repeats": "the repeats are in the folder names",
    "debug_dataset": "training starts as usual",
    "cache_info": "captions and sizes are read from the pictures each time",
    "face_crop_aug_range": "pictures are cropped without regard to faces",
    "validation_split": "all pictures would be trained, none held out",
    "validation_seed": _NO_VALIDATION,
    "validate_every_n_steps": _NO_VALIDATION,
    "validate_every_n_epochs": _NO_VALIDATION,
    "max_validation_steps": _NO_VALIDATION,
    "mem_eff_attn": "PyTorch's own attention, which is always used, needs as little memory",
    "ddp_gradient_as_bucket_view": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "deepspeed": "use accelerate launch --multi_gpu; --fp8_base and --gradient_checkpointing save memory",
    "zero_stage": _NO_DEEPSPEED,
    "offload_optimizer_device": _NO_DEEPSPEED,
    "offload_optimizer_nvme_path": _NO_DEEPSPEED,
    "offload_param_device": _NO_DEEPSPEED,
    "offload_param_nvme_path": _NO_DEEPSPEED,
    "zero3_init_flag": _NO_DEEPSPEED,
    "zero3_save_16bit_model": _NO_DEEPSPEED,
    "fp16_master_weights_and_gradients": _NO_DEEPSPEED,
    "fused_backward_pass": "a network's gradients are too small to be worth it; kohya's script does nothing either",
    "huggingface_repo_id": _NO_UPLOAD,
    "huggingface_repo_type": _NO_UPLOAD,
    "huggingface_path_in_repo": _NO_UPLOAD,
    "huggingface_token": _NO_UPLOAD,
    "huggingface_repo_visibility": _NO_UPLOAD,
    "save_state_to_huggingface": _NO_UPLOAD,
    "async_upload": _NO_UPLOAD,
    "resume_from_huggingface": "training would start anew; download the state and give its folder to --resume",
    "log_with": _NO_WANDB,
    "log_tracker_config": "the tracker keeps its own settings",
    "wandb_run_name": _NO_WANDB,
    "wandb_api_key": _NO_WANDB,
    "tokenizer_cache_dir": "the tokenizer comes with this suite, and nothing is downloaded",
    "lowram": "checkpoints are mapped into memory, not read into it, so there is nothing to spare",
    "highvram": "the GPU's caches are never emptied between steps, so there is nothing to skip",
}

# of these, the ones without which something else would be trained than was asked for
REFUSED = frozenset(
    {
        *("in_json", "dataset_class", "validation_split", "deepspeed"),
        "resume_from_huggingface",
    }
)
HONOURED_VALUES = {"log_with": ("tensorboard",)}

# option -> the option without which it has no effect
ONLY_WITH = {
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "sample_at_first": "sample_prompts",
    "noise_offset_random_strength": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "bucket_no_upscale": "enable_bucket",
    "conditioning_data_dir": "masked_loss",
    "cpu_offload_checkpointing": "gradient_checkpointing",
    "dynamo_backend": "torch_compile",
}

# option -> the option beside which it has no effect
NOT_BESIDE = {
    "network_dim": "dim_from_weights",
    "network_alpha": "dim_from_weights",
    "initial_step": "resume",
    "initial_epoch": "resume",
}


def refusals_for(options: Any) -> list[str]:
    """An error sentence for each option that is set and whose neglect would change what is trained."""
    return [f"--{name} is not supported: {NOT_HONOURED[name]}" for name in _not_honoured(options) if name in REFUSED]


def warnings_for(options: Any) -> list[str]:
    """A sentence for each option that is set and has no effect here."""
    warnings = [
        f"--{name} has no effect: {NOT_HONOURED[name]}" for name in _not_honoured(options) if name not in REFUSED
    ]
    flags = flags_of(type(options))
    warnings += [
        f"--{name} has no effect without --{needed}"
        for name, needed in ONLY_WITH.items()
        if getattr(options, name) != flags[name].default and not getattr(options, needed)
    ]
    warnings += [
        f"--{name} has no effect beside --{other}"
        for name, other in NOT_BESIDE.items()
        if getattr(options, name) != flags[name].default and getattr(options, other)
    ]
    if options.zero_terminal_snr and not options.v_parameterization:
        warnings.append("--zero_terminal_snr is meant for --v_parameterization: a model that predicts noise may suffer")
    first = "initial_epoch" if options.initial_step is None else "initial_step"
    is_later = options.initial_step or (options.initial_epoch or 1) > 1
    has_schedule = options.lr_scheduler_type or options.lr_scheduler != "constant"
    if is_later and has_schedule and not options.resume:
        warnings.append(f"--{first}: the learning-rate schedule starts at its beginning; --resume goes on with it")
    if options.xformers and options.sdpa:
        warnings.append("--xformers and --sdpa are both given; one is enough, and xformers goes first")
    return warnings


def _not_honoured(options: Any) -> list[str]:
    """Names of the options of the table that are set to something else than their default."""
    flags = flags_of(type(options))
    return [
        name
        for name in NOT_HONOURED
        if name in flags
        and getattr(options, name) != flags[name].default
        and getattr(options, name) not in HONOURED_VALUES.get(name, ())
    ]
