"""Options that are accepted and not acted on, each with its reason; what would change what is trained is refused."""

from typing import Any

from library.options.derived import chooses_own_rate, resumes_newest, tracker_names
from library.options.fields import Flag, flags_of

_NO_DDP = "gradients are averaged without DistributedDataParallel"
_NO_DEEPSPEED = "it belongs to --deepspeed, which is not supported"

# flag -> what happens instead
NOT_HONOURED: dict[str, str] = {
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
    "tokenizer_cache_dir": "the tokenizer comes with this suite, and nothing is downloaded",
    "lowram": "checkpoints are mapped into memory, not read into it, so there is nothing to spare",
    "highvram": "the GPU's caches are never emptied between steps, so there is nothing to skip",
}

# of these, the ones without which something else would be trained than was asked for
REFUSED = frozenset({"deepspeed"})

# option -> the option without which it has no effect
ONLY_WITH = {
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "sample_at_first": "sample_prompts",
    "noise_offset_random_strength": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "multires_noise_discount": "multires_noise_iterations",
    "conditioning_data_dir": "masked_loss",
    "log_prefix": "logging_dir",
    "huggingface_repo_type": "huggingface_repo_id",
    "huggingface_path_in_repo": "huggingface_repo_id",
    "huggingface_repo_visibility": "huggingface_repo_id",
    "save_state_to_huggingface": "huggingface_repo_id",
    "async_upload": "huggingface_repo_id",
    "cpu_offload_checkpointing": "gradient_checkpointing",
    "dynamo_backend": "torch_compile",
    "latent_cache": "cache_latents_to_disk",
    "ema_decay": "ema",
    "persistent_data_loader_workers": "max_data_loader_n_workers",
}

# option -> options of which one must be given for it to have an effect
ONLY_WITH_ANY = {
    "log_config": ("logging_dir", "log_with"),
    "log_tracker_name": ("logging_dir", "log_with"),
    "log_tracker_config": ("logging_dir", "log_with"),
    "save_state_to_huggingface": ("save_state", "save_state_on_train_end"),
    "huggingface_token": ("huggingface_repo_id", "resume_from_huggingface"),
    "sample_prompts": (
        *("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs"),
        *("before_after", "grid_after_training"),
    ),
    "vae_batch_size": ("cache_latents", "cache_latents_to_disk"),
    "save_last_n_epochs": ("save_every_n_epochs", "save_n_epoch_ratio"),
    "save_last_n_epochs_state": ("save_state",),
    "save_last_n_steps": ("save_every_n_steps",),
    "save_last_n_steps_state": ("save_state",),
}

# option -> the option beside which it has no effect
NOT_BESIDE = {
    "network_dim": "dim_from_weights",
    "network_alpha": "dim_from_weights",
    "initial_step": "resume",
    "initial_epoch": "resume",
    "training_comment": "no_metadata",
    "lr_scheduler": "lr_scheduler_type",
    "max_train_steps": "max_train_epochs",
    "save_every_n_epochs": "save_n_epoch_ratio",
    "sample_every_n_steps": "sample_every_n_epochs",
    "text_encoder_lr": "network_train_unet_only",
    "unet_lr": "network_train_text_encoder_only",
}

# option -> the schedules that it has an effect on
ONLY_WITH_SCHEDULERS = {
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "lr_decay_steps": ("warmup_stable_decay",),
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
        f"--{name} has no effect without --{' or --'.join(needed)}"
        for name, needed in ONLY_WITH_ANY.items()
        if getattr(options, name) not in (flags[name].default, 0)
        and not any(getattr(options, other) for other in needed)
    ]
    warnings += [
        f"--{name} has no effect beside --{other}"
        for name, other in NOT_BESIDE.items()
        if getattr(options, name) != flags[name].default and getattr(options, other)
        if not (other == "resume" and resumes_newest(options))  # which counts where there is no state
    ]
    if options.dataset_class:
        given = [name for name in _flags_of_pictures(flags) if getattr(options, name) != flags[name].default]
        warnings += [f"--{name} has no effect beside --dataset_class, which makes its own batches" for name in given]
    if options.bucket_no_upscale and not (options.enable_bucket or options.dataset_config):
        warnings.append("--bucket_no_upscale has no effect without --enable_bucket")
    if options.dataset_repeats != 1 and not (options.in_json or options.dataset_config):
        warnings.append("--dataset_repeats has no effect: the repeats are in the folder names")
    if options.in_json and not options.dataset_config:
        warnings += [
            f"--{name} has no effect beside --in_json, which names pictures and captions"
            for name in ("reg_data_dir", "caption_extension", "caption_extention", "cache_info")
            if getattr(options, name) != flags[name].default
        ]
    warnings += _schedule_warnings(options, flags) + _loss_warnings(options, flags) + _metadata_warnings(options, flags)
    if options.zero_terminal_snr and not options.v_parameterization:
        warnings.append("--zero_terminal_snr is meant for --v_parameterization: a model that predicts noise may suffer")
    if "wandb" not in tracker_names(options):
        unused = [name for name in ("wandb_run_name", "wandb_api_key") if getattr(options, name)]
        warnings += [f"--{name} has no effect without --log_with wandb" for name in unused]
    first = "initial_epoch" if options.initial_step is None else "initial_step"
    is_later = options.initial_step or (options.initial_epoch or 1) > 1
    has_schedule = options.lr_scheduler_type or options.lr_scheduler != "constant"
    if is_later and has_schedule and not (options.resume and not resumes_newest(options)):
        warnings.append(f"--{first}: the learning-rate schedule starts at its beginning; --resume goes on with it")
    if options.xformers and options.sdpa:
        warnings.append("--xformers and --sdpa are both given; one is enough, and xformers goes first")
    return warnings


def _schedule_warnings(options: Any, flags: dict[str, Flag]) -> list[str]:
    name = options.lr_scheduler
    if chooses_own_rate(options):
        return []
    given = {o: names for o, names in ONLY_WITH_SCHEDULERS.items() if getattr(options, o) != flags[o].default}
    if options.lr_scheduler_type:
        return [f"--{option} has no effect beside --lr_scheduler_type" for option in given]
    warnings = [
        f"--{option} has no effect on --lr_scheduler {name}, but on {' and '.join(schedulers)}"
        for option, schedulers in given.items()
        if name not in schedulers
    ]
    if options.lr_warmup_steps and name == "piecewise_constant":
        warnings.append(
            "--lr_warmup_steps has no effect on --lr_scheduler piecewise_constant: write it into step_rules"
        )
    return warnings


def _loss_warnings(options: Any, flags: dict[str, Flag]) -> list[str]:
    names = ("huber_schedule", "huber_c", "huber_scale")
    given = [name for name in names if getattr(options, name) != flags[name].default]
    if options.loss_type not in ("huber", "smooth_l1"):
        warnings = [f"--{name} has no effect without --loss_type huber or smooth_l1" for name in given]
    elif "huber_scale" in given and options.huber_schedule == "snr":
        warnings = ["--huber_scale has no effect with --huber_schedule snr, but with constant and exponential"]
    else:
        warnings = []
    lowest, end = options.min_timestep or 0, 1000 if options.max_timestep is None else options.max_timestep
    if lowest == end:
        warnings.append(
            f"--min_timestep {lowest} is not below --max_timestep {end}: every step trains timestep {min(end, 999)}"
        )
    return warnings


def _metadata_warnings(options: Any, flags: dict[str, Flag]) -> list[str]:
    given = [n for n in flags if n.startswith("metadata_") or n == "training_comment" if getattr(options, n)]
    if not given or options.save_model_as == "safetensors":
        return []
    names = " and ".join(f"--{name}" for name in given)
    return [f"{names}: no effect, as --save_model_as {options.save_model_as} writes weights alone"]


def _not_honoured(options: Any) -> list[str]:
    """Names of the options of the table that are set to something else than their default."""
    flags = flags_of(type(options))
    return [name for name in NOT_HONOURED if name in flags and getattr(options, name) != flags[name].default]


def _flags_of_pictures(flags: dict[str, Flag]) -> list[str]:
    """The options that say which pictures and captions there are and what becomes of them."""
    own = ("dataset_class", "resolution", "max_data_loader_n_workers", "persistent_data_loader_workers")
    return [name for name, flag in flags.items() if flag.group.__name__ == "DatasetOptions" and name not in own]
