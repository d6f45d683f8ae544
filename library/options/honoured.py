"""Options that are accepted but not, or not yet, acted on; those that change what is trained are refused."""

from typing import Any

from library.options.derived import tracker_names
from library.options.fields import flags_of

_ONE_PROCESS = "training runs without the settings of several GPUs"
_NO_DEEPSPEED = "DeepSpeed is not used"

# flag -> what happens instead
NOT_HONOURED: dict[str, str] = {
    "dataset_class": "classes written for sd-scripts need its modules; describe the pictures with --dataset_config",
    "torch_compile": "the model runs without compilation",
    "dynamo_backend": "the model runs without compilation",
    "mem_eff_attn": "PyTorch's own attention is used",
    "cpu_offload_checkpointing": "checkpointed values stay on the GPU",
    "fp8_base": "the base model would keep its number format",
    "fp8_base_unet": "the base model would keep its number format",
    "ddp_timeout": _ONE_PROCESS,
    "ddp_gradient_as_bucket_view": _ONE_PROCESS,
    "ddp_static_graph": _ONE_PROCESS,
    "deepspeed": "training would run without it",
    "zero_stage": _NO_DEEPSPEED,
    "offload_optimizer_device": _NO_DEEPSPEED,
    "offload_optimizer_nvme_path": _NO_DEEPSPEED,
    "offload_param_device": _NO_DEEPSPEED,
    "offload_param_nvme_path": _NO_DEEPSPEED,
    "zero3_init_flag": _NO_DEEPSPEED,
    "zero3_save_16bit_model": _NO_DEEPSPEED,
    "fp16_master_weights_and_gradients": _NO_DEEPSPEED,
    "fused_backward_pass": "the optimizer takes its step after the backward pass",
    "tokenizer_cache_dir": "the tokenizer comes with this suite, and nothing is downloaded",
    "lowram": "models are loaded the same way with and without it",
    "highvram": "memory is used the same way with and without it",
}

# of these, the ones without which something else would be trained than was asked for
REFUSED = frozenset(
    {
        *("dataset_class", "deepspeed"),
        *("fp8_base", "fp8_base_unet"),
    }
)

# option -> the option without which it has no effect
ONLY_WITH = {
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "sample_at_first": "sample_prompts",
    "noise_offset_random_strength": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "bucket_no_upscale": "enable_bucket",
    "conditioning_data_dir": "masked_loss",
    "log_prefix": "logging_dir",
    "huggingface_repo_type": "huggingface_repo_id",
    "huggingface_path_in_repo": "huggingface_repo_id",
    "huggingface_repo_visibility": "huggingface_repo_id",
    "save_state_to_huggingface": "huggingface_repo_id",
    "async_upload": "huggingface_repo_id",
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
NOT_BESIDE = {"network_dim": "dim_from_weights", "network_alpha": "dim_from_weights"}


def refusals_for(options: Any) -> list[str]:
    """An error sentence for each option that is set and whose neglect would change what is trained."""
    return [
        f"--{name} is not supported yet: {NOT_HONOURED[name]}" for name in _not_honoured(options) if name in REFUSED
    ]


def warnings_for(options: Any) -> list[str]:
    """A sentence for each option that is set and has no effect here."""
    warnings = [
        f"--{name} has no effect: {NOT_HONOURED[name]}" for name in _not_honoured(options) if name not in REFUSED
    ]
    warnings += [
        f"--{name} has no effect without --{needed}"
        for name, needed in ONLY_WITH.items()
        if getattr(options, name) and not getattr(options, needed)
    ]
    warnings += [
        f"--{name} has no effect without --{' or --'.join(needed)}"
        for name, needed in ONLY_WITH_ANY.items()
        if getattr(options, name) and not any(getattr(options, other) for other in needed)
    ]
    flags = flags_of(type(options))
    warnings += [
        f"--{name} has no effect beside --{other}"
        for name, other in NOT_BESIDE.items()
        if getattr(options, name) != flags[name].default and getattr(options, other)
    ]
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
    if options.xformers and options.sdpa:
        warnings.append("--xformers and --sdpa are both given; one is enough, and xformers goes first")
    return warnings


def _not_honoured(options: Any) -> list[str]:
    """Names of the options of the table that are set to something else than their default."""
    flags = flags_of(type(options))
    return [name for name in NOT_HONOURED if name in flags and getattr(options, name) != flags[name].default]
