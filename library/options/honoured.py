"""Options that are accepted and not acted on, each with its reason; two that change what is trained are refused."""

from typing import Any

from library.options.derived import tracker_names
from library.options.fields import flags_of

_NO_DDP = "gradients are averaged without DistributedDataParallel"
_NO_DEEPSPEED = "it belongs to --deepspeed, which is not supported"

# flag -> what happens instead
NOT_HONOURED: dict[str, str] = {
    "dataset_class": "classes written for sd-scripts need its modules; describe the pictures with --dataset_config",
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
    "cache_text_encoder_outputs_to_disk": "outputs are kept in memory, and computed once at every start",
    "tokenizer_cache_dir": "the tokenizer comes with this suite, and nothing is downloaded",
    "lowram": "checkpoints are mapped into memory, not read into it, so there is nothing to spare",
    "highvram": "the GPU's caches are never emptied between steps, so there is nothing to skip",
}

# of these, the ones without which something else would be trained than was asked for
REFUSED = frozenset({"dataset_class", "deepspeed"})

# option -> the option without which it has no effect
ONLY_WITH = {
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "sample_at_first": "sample_prompts",
    "noise_offset_random_strength": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "conditioning_data_dir": "masked_loss",
    "log_prefix": "logging_dir",
    "huggingface_repo_type": "huggingface_repo_id",
    "huggingface_path_in_repo": "huggingface_repo_id",
    "huggingface_repo_visibility": "huggingface_repo_id",
    "save_state_to_huggingface": "huggingface_repo_id",
    "async_upload": "huggingface_repo_id",
    "cpu_offload_checkpointing": "gradient_checkpointing",
    "dynamo_backend": "torch_compile",
}

# option -> options of which one must be given for it to have an effect
ONLY_WITH_ANY = {
    "log_config": ("logging_dir", "log_with"),
    "log_tracker_name": ("logging_dir", "log_with"),
    "log_tracker_config": ("logging_dir", "log_with"),
    "save_state_to_huggingface": ("save_state", "save_state_on_train_end"),
    "huggingface_token": ("huggingface_repo_id", "resume_from_huggingface"),
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
        f"--{name} has no effect without --{' or --'.join(needed)}"
        for name, needed in ONLY_WITH_ANY.items()
        if getattr(options, name) and not any(getattr(options, other) for other in needed)
    ]
    warnings += [
        f"--{name} has no effect beside --{other}"
        for name, other in NOT_BESIDE.items()
        if getattr(options, name) != flags[name].default and getattr(options, other)
    ]
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
    if options.zero_terminal_snr and not options.v_parameterization:
        warnings.append("--zero_terminal_snr is meant for --v_parameterization: a model that predicts noise may suffer")
    if "wandb" not in tracker_names(options):
        unused = [name for name in ("wandb_run_name", "wandb_api_key") if getattr(options, name)]
        warnings += [f"--{name} has no effect without --log_with wandb" for name in unused]
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
    return [name for name in NOT_HONOURED if name in flags and getattr(options, name) != flags[name].default]
