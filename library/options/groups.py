"""Every option of the training script, once: field, type, default, help and check, in groups by concern.

Names, types and defaults of the flags are kohya's, so that command lines and configurations keep working.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from library.errors import quoted_list
from library.options.checks import (
    above_zero,
    at_least,
    at_most,
    caption_numbers,
    conflict,
    existing_dir,
    existing_file,
    file_name,
    name_below,
    problems_of,
    rates,
)
from library.options.derived import (
    MAX_SIDE,
    PROMPT_SUFFIXES,
    caches_latents,
    caches_text,
    face_crop_range,
    hub_place,
    is_schedule_free,
    names_prompt_file,
    network_arguments,
    optimizer_name,
    parse_key_values,
    resolution_wh,
    resumes_newest,
    trained_rates,
)
from library.options.fields import OptionGroup, option

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "piecewise_constant",
    "adafactor",
)
SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),
)
DYNAMO_BACKENDS = (
    *("eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs"),
    *("ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm"),
)
HUB_VALUES = {
    "huggingface_repo_type": ("model", "dataset", "space"),
    "huggingface_repo_visibility": ("public", "private"),
}
MAX_SEED = 2**32 - 1  # numpy takes no larger one


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """Base model"""

    pretrained_model_name_or_path: str | None = option(
        None, "base model: a .safetensors or .ckpt file, or a folder in diffusers layout", flag_type="path"
    )
    v2: bool = option(False, "the base model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, "the model predicts velocity (v) instead of noise")
    vae: str | None = option(None, "file or folder of a VAE to use instead of the model's own", flag_type="path")
    tokenizer_cache_dir: str | None = option(None, "folder that keeps tokenizer files", flag_type="path")
    clip_skip: int | None = option(None, "take the text encoder's layer N from the end; 1 is the last")
    max_token_length: int | None = option(None, "longest caption in tokens; 75 when not given", choices=(150, 225))
    weighted_captions: bool = option(
        False, "read (word:1.3) and [word] in captions as weights; commas inside brackets do not survive shuffling"
    )
    no_half_vae: bool = option(False, "keep the VAE in float32 with mixed precision")
    disable_mmap_load_safetensors: bool = option(
        False, "read a .safetensors model piece by piece instead of mapping it into memory: faster on network drives"
    )
    lowram: bool = option(False, "load the models straight into the memory of the GPU")
    highvram: bool = option(False, "spare no GPU memory: skip the freeing of caches between steps")

    def check(self) -> list[str]:
        problems = at_least(self, 1, "clip_skip") + self._check_model()
        if self.vae and not Path(self.vae).exists():
            problems.append(f"--vae: there is no file or folder {self.vae}")
        return problems

    def _check_model(self) -> list[str]:
        if self.pretrained_model_name_or_path:
            return []
        return ["--pretrained_model_name_or_path is required: the file or folder of the base model"]


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(OptionGroup):
    """Pictures and captions"""

    train_data_dir: str | None = option(
        None, "folder whose sub-folders, named REPEATS_NAME, hold the training pictures", flag_type="path"
    )
    reg_data_dir: str | None = option(
        None, "folder of regularisation pictures, laid out like --train_data_dir", flag_type="path"
    )
    in_json: str | None = option(None, "JSON file of captions and tags for --train_data_dir", flag_type="path")
    dataset_config: Path | None = option(None, "TOML or JSON file that describes the dataset")
    dataset_class: str | None = option(None, "MODULE.CLASS of a dataset of your own, whose items are whole batches")
    dataset_repeats: int = option(
        1, "repeats of every picture of --in_json, and of subsets of --dataset_config without num_repeats"
    )
    conditioning_data_dir: str | None = option(
        None, "folder of masks named like the pictures, for --masked_loss", flag_type="path"
    )
    cache_info: bool = option(False, "keep captions and picture sizes in a file beside the pictures")

    shuffle_caption: bool = option(False, "put the tags of a caption into a new order each time")
    caption_separator: str = option(",", "what separates the tags of a caption")
    caption_extension: str = option(".caption", "ending of caption files", aliases=("caption_extention",))
    caption_extention: str | None = option(None, "old spelling of --caption_extension")
    keep_tokens: int = option(0, "this many tags at the start of a caption stay in place")
    keep_tokens_separator: str = option("", "tags before this mark stay in place, whatever --keep_tokens says")
    secondary_separator: str | None = option(None, "joins tags that stay together; becomes --caption_separator")
    enable_wildcard: bool = option(False, "pick one of {a|b|c} and one line of a caption with several lines")
    caption_prefix: str | None = option(None, "text put before every caption")
    caption_suffix: str | None = option(None, "text put after every caption")
    token_warmup_min: int = option(1, "number of tags that --token_warmup_step starts with")
    token_warmup_step: float = option(0, "all tags are in use from this step on; below 1 it is a share of all steps")
    caption_dropout_rate: float = option(0.0, "share of pictures that are trained with an empty caption")
    caption_dropout_every_n_epochs: int = option(0, "every N epochs all captions are empty; 0 is never")
    caption_tag_dropout_rate: float = option(0.0, "share of tags that are left out of a caption")

    color_aug: bool = option(False, "change hue or gamma of pictures a little")
    flip_aug: bool = option(False, "mirror half of the pictures left to right")
    face_crop_aug_range: str | None = option(None, "smallest and largest crop around a face, such as 2.0,4.0")
    random_crop: bool = option(False, "crop at a random place instead of the centre")
    alpha_mask: bool = option(False, "weigh the loss by the transparency of the picture")
    debug_dataset: bool = option(
        False, "draw the pictures and captions of the first batches as training sees them, and stop"
    )

    resolution: str | None = option(
        None, "size of training in pixels: SIDE or WIDTH,HEIGHT", aliases=("max_resolution",)
    )
    enable_bucket: bool = option(False, "keep the shape of pictures by sorting them into buckets of like shape")
    min_bucket_reso: int = option(256, "shortest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "longest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this many pixels")
    bucket_no_upscale: bool = option(False, "never enlarge a picture to fill its bucket")
    resize_interpolation: str | None = option(
        None,
        "how pictures are resized; area to shrink and lanczos to enlarge when not given",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    fast_jpeg: bool = option(
        False,
        "decode large JPEGs at a half, a quarter or an eighth where the bucket is no larger; pixels differ by about 1",
    )

    cache_latents: bool = option(False, "run the VAE once over the pictures and keep the latents in memory")
    cache_latents_to_disk: bool = option(False, "as --cache_latents, and keep them in files beside the pictures")
    latent_cache: str = option(
        "npz",
        "files of --cache_latents_to_disk: npz, kohya's, one for each picture, or packed, a few large ones in each "
        "folder, which are checked faster; each takes over what the other holds",
        choices=("npz", "packed"),
    )
    cache_text_encoder_outputs: bool = option(
        False, "insist on encoding every caption only once, before training; done without it too where that is possible"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "as --cache_text_encoder_outputs, and keep them in files beside the pictures (Stable Diffusion XL only)"
    )
    vae_batch_size: int = option(1, "number of pictures the VAE sees at once while caching")
    skip_cache_check: bool = option(
        False, "trust latents and text encoder outputs found on disk without reading them first"
    )
    train_batch_size: int = option(1, "number of pictures in a batch")
    max_data_loader_n_workers: int = option(
        8, "largest number of processes, or while caching threads, that load pictures; 0 loads in place"
    )
    persistent_data_loader_workers: bool = option(False, "keep the loading processes from epoch to epoch")
    validation_split: float = option(0.0, "share of the pictures that is held out for validation")
    validation_seed: int | None = option(None, "seed of the choice of validation pictures")

    def check(self) -> list[str]:
        return [
            *self._check_numbers(),
            *self._check_required(),
            *problems_of(face_crop_range, self),
            *self._check_latent_cache(),
            *(self._check_resolution() if self.dataset_config is None else []),
        ]

    def _check_numbers(self) -> list[str]:
        return [
            *at_least(self, 1, "dataset_repeats", "vae_batch_size", "train_batch_size"),
            *at_least(self, 1, "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"),
            *at_most(self, MAX_SIDE, "max_bucket_reso"),
            *at_least(self, 0, "max_data_loader_n_workers"),
            *caption_numbers(self),
            *rates(self, "validation_split"),
        ]

    def _check_required(self) -> list[str]:
        if self.dataset_class:
            return self._check_own_dataset()
        if self.in_json and not self.dataset_config:
            advice = "its pictures are masked by their transparency, with --alpha_mask"
            masks = conflict(self, "in_json", "conditioning_data_dir", advice)
            return [*existing_file("in_json", self.in_json), *masks]
        if self.dataset_config:
            return []
        if self.train_data_dir:
            return existing_dir("conditioning_data_dir", self.conditioning_data_dir) if self.masked_loss else []
        return ["--train_data_dir (or --dataset_config) is required: the folder of the training pictures"]

    def _check_own_dataset(self) -> list[str]:
        advice = "its batches are its own affair"
        caches = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs")
        others = ("dataset_config", "in_json", *caches, "cache_text_encoder_outputs_to_disk", "debug_dataset")
        return [problem for name in others for problem in conflict(self, name, "dataset_class", advice)]

    def _check_latent_cache(self) -> list[str]:
        if not caches_latents(self):
            return []
        flag = "cache_latents" if self.cache_latents else "cache_latents_to_disk"
        advice = "cached pictures cannot change from step to step, drop one of the two"
        by_faces = not self.enable_bucket and not self.dataset_config  # else there are none, or the file says where
        changing = ["color_aug", "random_crop", *(["face_crop_aug_range"] if by_faces else [])]
        return [problem for name in changing for problem in conflict(self, flag, name, advice)]

    def _check_resolution(self) -> list[str]:
        problems = problems_of(resolution_wh, self)
        if problems or not self.enable_bucket or min(self.bucket_reso_steps, self.min_bucket_reso) < 1:
            return problems
        return self._check_bucket_range()

    def _check_bucket_range(self) -> list[str]:
        if self.min_bucket_reso > self.max_bucket_reso:
            found = f"{self.min_bucket_reso} and {self.max_bucket_reso}"
            return [f"--min_bucket_reso must not be above --max_bucket_reso, got {found}"]
        steps = self.bucket_reso_steps
        lowest, highest = self.min_bucket_reso // steps * steps, -(-self.max_bucket_reso // steps) * steps
        sides = resolution_wh(self)
        problems = []
        if min(sides) < max(lowest, steps):
            limit = f"--min_bucket_reso {self.min_bucket_reso}" if lowest >= steps else f"--bucket_reso_steps {steps}"
            problems.append(f"--resolution must not be below {limit} with --enable_bucket, got {self.resolution}")
        if max(sides) > highest:
            limit = f"--max_bucket_reso {self.max_bucket_reso}"
            problems.append(f"--resolution must not be above {limit} with --enable_bucket, got {self.resolution}")
        return problems


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions(OptionGroup):
    """Noise and loss"""

    noise_offset: float | None = option(None, "adds noise of this strength to the mean of each channel, about 0.1")
    noise_offset_random_strength: bool = option(False, "draw the strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = option(None, "adds this times the mean of the latents to --noise_offset")
    multires_noise_iterations: int | None = option(None, "adds noise of this many coarser resolutions, 6 to 10")
    multires_noise_discount: float = option(0.3, "strength of each coarser resolution relative to the one before")
    ip_noise_gamma: float | None = option(None, "input perturbation, arXiv:2301.11706: strength of the extra noise")
    ip_noise_gamma_random_strength: bool = option(False, "draw the strength between 0 and --ip_noise_gamma")
    zero_terminal_snr: bool = option(False, "change the noise schedule so that it ends in pure noise, arXiv:2305.08891")
    min_timestep: int | None = option(None, "smallest timestep that is trained, 0 when not given")
    max_timestep: int | None = option(None, "timesteps below this one are trained, 1000 when not given")

    loss_type: str = option("l2", "how prediction and target are compared", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr", "how the width of the Huber loss depends on the timestep", choices=("constant", "exponential", "snr")
    )
    huber_c: float = option(0.1, "width of the Huber loss")
    huber_scale: float = option(1.0, "factor on the width of the Huber loss")
    min_snr_gamma: float | None = option(None, "min-SNR loss weighting, arXiv:2303.09556, about 5")
    scale_v_pred_loss_like_noise_pred: bool = option(False, "weigh the loss of a v model like that of a noise model")
    v_pred_like_loss: float | None = option(None, "adds this much of a loss weighted as for v prediction")
    debiased_estimation_loss: bool = option(False, "debiased estimation loss weighting, arXiv:2310.08442")
    prior_loss_weight: float = option(1.0, "weight of the loss of regularisation pictures")
    masked_loss: bool = option(False, "weigh the loss by masks: --conditioning_data_dir, or those of the dataset")

    def check(self) -> list[str]:
        problems = [
            *at_least(self, 0, "multires_noise_iterations", "min_snr_gamma", "prior_loss_weight", "v_pred_like_loss"),
            *at_least(self, 0, "ip_noise_gamma", "multires_noise_discount", "min_timestep"),
            *at_least(self, 1, "max_timestep"),
            *above_zero(self, "huber_c", "huber_scale"),
            *(
                f"--{name} must be at most 1000, got {getattr(self, name)}"
                for name in ("min_timestep", "max_timestep")
                if (getattr(self, name) or 0) > 1000
            ),
        ]
        lowest, end = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if not problems and lowest > end:
            problems.append(f"--min_timestep {lowest} is above --max_timestep {end}: nothing is left to train")
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            problems.append("--adaptive_noise_scale needs --noise_offset, for example 0.05")
        return problems


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """Optimizer"""

    optimizer_type: str = option("", "AdamW, AdamW8bit, Lion, Adafactor, Prodigy and more", aliases=("optimizer",))
    use_8bit_adam: bool = option(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as --optimizer_type Lion")
    learning_rate: float = option(2e-6, "learning rate")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 does not clip")
    optimizer_args: list[str] | None = option(None, "more arguments of the optimizer: key=value ...")
    fused_backward_pass: bool = option(False, "take the optimizer's step during the backward pass")

    def check(self) -> list[str]:
        advice = "they name different optimizers, keep one"
        return [
            *at_least(self, 0, "learning_rate", "max_grad_norm"),
            *conflict(self, "use_8bit_adam", "use_lion_optimizer", advice),
            *conflict(self, "use_8bit_adam", "optimizer_type", advice),
            *conflict(self, "use_lion_optimizer", "optimizer_type", advice),
            *problems_of(parse_key_values, self.optimizer_args, "optimizer_args"),
        ]


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions(OptionGroup):
    """Schedule of the learning rate"""

    lr_scheduler: str = option("constant", f"one of {', '.join(SCHEDULERS)}")
    lr_scheduler_type: str = option("", "a class to use instead: a name of torch.optim.lr_scheduler or a dotted name")
    lr_scheduler_args: list[str] | None = option(None, "more arguments of the scheduler: key=value ...")
    lr_warmup_steps: int | float = option(0, "steps to reach the learning rate: a number, a share below 1, or 10%")
    lr_decay_steps: int | float = option(0, "steps of the final decay: a number, a share below 1, or 10%")
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts", aliases=("lr_restart_cycles",))
    lr_scheduler_power: float = option(1, "power of the polynomial scheduler")
    lr_scheduler_timescale: int | None = option(None, "time scale of inverse_sqrt; the warm-up when not given")
    lr_scheduler_min_lr_ratio: float | None = option(None, "lowest learning rate as a share of the full one")

    def check(self) -> list[str]:
        problems = [
            *at_least(self, 0, "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_min_lr_ratio"),
            *at_least(self, 1, "lr_scheduler_num_cycles", "lr_scheduler_timescale"),
            *problems_of(parse_key_values, self.lr_scheduler_args, "lr_scheduler_args"),
        ]
        return problems or (
            self._check_class() if self.lr_scheduler_type else self._check_name() or self._check_needs()
        )

    def _check_class(self) -> list[str]:
        if self.lr_scheduler_type.rpartition(".")[2] != "ReduceLROnPlateau":
            return []
        what = "follows a measured loss, which is not given to schedules"
        return [f"--lr_scheduler_type {self.lr_scheduler_type} {what}; try cosine"]

    def _check_name(self) -> list[str]:
        if self.lr_scheduler in SCHEDULERS or re.fullmatch(r"adafactor:\d+(\.\d+)?(e-?\d+)?", self.lr_scheduler):
            return []
        nearest = difflib.get_close_matches(self.lr_scheduler.lower(), SCHEDULERS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"known are {quoted_list(list(SCHEDULERS), limit=20)}"
        return [f"--lr_scheduler {self.lr_scheduler} is not known; {advice}"]

    def _check_needs(self) -> list[str]:
        given = parse_key_values(self.lr_scheduler_args, "lr_scheduler_args").keys()
        has_minimum = self.lr_scheduler_min_lr_ratio is not None or {"min_lr", "min_lr_rate"} & given
        if self.lr_scheduler == "cosine_with_min_lr" and not has_minimum:
            return ["--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, for example 0.1"]
        if self.lr_scheduler == "piecewise_constant" and "step_rules" not in given:
            example = "\"step_rules='1:5,0.1:10,0.01'\""
            return [f"--lr_scheduler piecewise_constant needs --lr_scheduler_args {example}"]
        return []


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(OptionGroup):
    """Network that is trained"""

    network_module: str | None = option(None, "module of the network, such as networks.lora")
    network_weights: str | None = option(
        None, "network file to start from", flag_type="path", aliases=("lora_network_weights",)
    )
    network_dim: int | None = option(None, "rank of the network")
    network_alpha: float = option(1, "the network's change is scaled by alpha / dim")
    network_dropout: float | None = option(None, "share of the network's inner values set to 0 in training")
    network_args: list[str] | None = option(None, "more arguments of the network: key=value ...")
    network_train_unet_only: bool = option(False, "train the U-Net's part of the network only")
    network_train_text_encoder_only: bool = option(False, "train the text encoder's part of the network only")
    unet_lr: float | None = option(None, "learning rate of the U-Net, --learning_rate when not given")
    text_encoder_lr: list[float] | None = option(
        None, "learning rate of each text encoder, --learning_rate when not given"
    )
    dim_from_weights: bool = option(False, "take rank and alpha from --network_weights")
    base_weights: list[str] | None = option(
        None, "network files merged into the base model before training", flag_type="path"
    )
    base_weights_multiplier: list[float] | None = option(None, "strength of each of --base_weights, 1 when not given")
    scale_weight_norms: float | None = option(None, "largest norm of a layer's change; larger ones are scaled down")

    def check(self) -> list[str]:
        problems = [
            *at_least(self, 1, "network_dim"),
            *at_least(self, 0, "network_alpha", "unet_lr"),
            *(f"--text_encoder_lr must be at least 0, got {rate}" for rate in self.text_encoder_lr or [] if rate < 0),
            *above_zero(self, "scale_weight_norms"),
            *rates(self, "network_dropout"),
            *existing_file("network_weights", self.network_weights),
            *(problem for path in self.base_weights or [] for problem in existing_file("base_weights", path)),
            *conflict(
                self, "network_train_unet_only", "network_train_text_encoder_only", "nothing would be left to train"
            ),
            *problems_of(network_arguments, self),
        ]
        if self.dim_from_weights and not self.network_weights:
            problems.append("--dim_from_weights needs --network_weights, the file to take the rank from")
        if len(self.base_weights_multiplier or []) > len(self.base_weights or []):
            found = f"{len(self.base_weights_multiplier)} numbers for {len(self.base_weights or [])} files"
            problems.append(f"--base_weights_multiplier takes one number for each of --base_weights, got {found}")
        return problems


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup):
    """Preview pictures"""

    sample_every_n_steps: int | None = option(None, "make previews every N steps")
    sample_every_n_epochs: int | None = option(None, "make previews every N epochs, instead of every N steps")
    sample_at_first: bool = option(False, "make previews before the first step")
    sample_prompts: str | None = option(
        None, "file of prompts for previews (.txt, .toml or .json), or the prompts, one a line", flag_type="prompts"
    )
    sample_sampler: str = option("ddim", "sampler of previews", choices=SAMPLERS)
    before_after: bool = option(
        False, "at the end write one picture that shows the sample prompts without and with the network"
    )
    grid_after_training: bool = option(
        False, "at the end draw the sample prompts with the network of each saved epoch at strengths 0.5 to 1.0"
    )

    def check(self) -> list[str]:
        for name in ("before_after", "grid_after_training"):
            if getattr(self, name) and not self.sample_prompts:
                return [f"--{name} needs --sample_prompts, the prompts to show"]
        if not self.sample_prompts or names_prompt_file(self.sample_prompts):
            return existing_file("sample_prompts", self.sample_prompts)
        if os.path.exists(self.sample_prompts):
            return [f"--sample_prompts: a file must end in {', '.join(PROMPT_SUFFIXES)}, got {self.sample_prompts}"]
        return []


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup):
    """Files that are written"""

    output_dir: str | None = option(None, "folder for all that is written; made if it is not there", flag_type="path")
    output_name: str | None = option(None, 'name of the network files without ending; "last" when not given')
    save_model_as: str = option("safetensors", "format of the network files", choices=("ckpt", "pt", "safetensors"))
    save_precision: str | None = option(
        None, "number format of the network files, as trained when not given", choices=("float", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = option(None, "save every N epochs")
    save_every_n_steps: int | None = option(None, "save every N steps")
    save_n_epoch_ratio: int | None = option(None, "save about N times in the whole run, at ends of epochs")
    save_last_n_epochs: int | None = option(None, "keep the files of the last N epochs, remove older ones")
    save_last_n_epochs_state: int | None = option(None, "as --save_last_n_epochs, for states")
    save_last_n_steps: int | None = option(None, "keep the files of the last N steps, remove older ones")
    save_last_n_steps_state: int | None = option(None, "as --save_last_n_steps, for states")
    save_state: bool = option(False, "with every network file save a state that training can resume from")
    save_state_on_train_end: bool = option(False, "save such a state at the end of training")
    training_comment: str | None = option(None, "text kept in the file's metadata")
    no_metadata: bool = option(False, "leave the training settings out of the file's metadata")
    metadata_title: str | None = option(None, "title in the file's metadata; the output name when not given")
    metadata_author: str | None = option(None, "author in the file's metadata")
    metadata_description: str | None = option(None, "description in the file's metadata")
    metadata_license: str | None = option(None, "license in the file's metadata")
    metadata_tags: str | None = option(None, "tags in the file's metadata, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use the network, in the file's metadata")
    metadata_thumbnail: str | None = option(None, "picture file or data URL for the file's metadata")
    metadata_merged_from: str | None = option(None, "names of merged models, in the file's metadata")
    metadata_trigger_phrase: str | None = option(None, "words that call the trained subject, in the file's metadata")
    metadata_preprocessor: str | None = option(None, "preprocessing the network expects, in the file's metadata")
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding, in the metadata")
    cover_image: str | None = option(
        None,
        "picture that programs show on the network's card, with its trigger words: a file, or auto for the first of "
        "the last previews",
        flag_type="path",
    )
    no_report: bool = option(False, "write no NAME-report.html, the page on the run, at the end")
    huggingface_repo_id: str | None = option(None, "repository on Hugging Face to upload to, OWNER/NAME")
    huggingface_repo_type: str | None = option(None, "kind of that repository: model, dataset or space")
    huggingface_path_in_repo: str | None = option(None, "folder in that repository; its top when not given")
    huggingface_token: str | None = option(
        None, "access token for Hugging Face; HF_TOKEN or a login when not given", is_secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, "public or private, for a repository that is made; private when not given"
    )
    save_state_to_huggingface: bool = option(False, "upload states too")
    resume_from_huggingface: bool = option(
        False, "read --resume as OWNER/REPO/FOLDER[:REVISION[:TYPE]] on Hugging Face"
    )
    async_upload: bool = option(False, "upload while training goes on")

    def check(self) -> list[str]:
        problems = [
            *at_least(self, 1, "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio"),
            *at_least(self, 0, "save_last_n_epochs", "save_last_n_epochs_state"),
            *at_least(self, 0, "save_last_n_steps", "save_last_n_steps_state"),
        ]
        problems += self._check_output_dir()
        problems += file_name("output_name", self.output_name, "output_dir")
        if self.metadata_thumbnail and not self.metadata_thumbnail.startswith("data:"):
            problems += existing_file("metadata_thumbnail", self.metadata_thumbnail)
        if self.cover_image != "auto":
            problems += existing_file("cover_image", self.cover_image)
        return problems + self._check_hub()

    def _check_output_dir(self) -> list[str]:
        if not self.output_dir:
            return ["--output_dir is required: the folder for the trained network"]
        if Path(self.output_dir).is_file():
            return [f"--output_dir must be a folder, but {self.output_dir} is a file"]
        return []

    def _check_hub(self) -> list[str]:
        repo_id, problems = self.huggingface_repo_id, []
        if repo_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
            problems.append(f"--huggingface_repo_id must be OWNER/NAME, got {repo_id!r}")
        for name, known in HUB_VALUES.items():
            if getattr(self, name) not in (None, *known):
                problems.append(f"--{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        return problems


@dataclass(frozen=True, kw_only=True)
class LoopOptions(OptionGroup):
    """Length of training"""

    max_train_steps: int = option(1600, "number of optimizer steps; --max_train_epochs goes first")
    max_train_epochs: int | None = option(
        None, "number of epochs, instead of --max_train_steps", aliases=("max_train_epoches", "epoch")
    )
    seed: int | None = option(None, "start of all random numbers: the same seed repeats a run")
    gradient_accumulation_steps: int = option(1, "number of batches that make one step")
    max_skipped_steps: int = option(
        10, "steps in a row that may be skipped because their loss is no number, before training ends"
    )
    ema: bool = option(False, "save, sample and validate an exponential moving average of the network's weights")
    ema_decay: float | None = option(
        None, "share of the average that a step leaves, 0.999 when not given; less in the first steps"
    )
    resume: str | None = option(
        None, "state folder to go on from; auto is the newest of this run, if there is one", flag_type="path"
    )
    skip_until_initial_step: bool = option(False, "run through the data up to the initial step without training")
    initial_epoch: int | None = option(None, "epoch to count from; 1 is the first")
    initial_step: int | None = option(None, "step to count from; goes before --initial_epoch")
    validate_every_n_steps: int | None = option(None, "compute the validation loss every N steps")
    validate_every_n_epochs: int | None = option(None, "compute the validation loss every N epochs")
    max_validation_steps: int | None = option(None, "largest number of validation batches")

    def check(self) -> list[str]:
        problems = [
            *at_least(self, 1, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "initial_epoch"),
            *at_least(self, 0, "initial_step", "max_skipped_steps"),
            *at_least(self, 1, "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
        ]
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            problems.append(f"--seed must be between 0 and {MAX_SEED}, got {self.seed}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            problems.append(f"--ema_decay must be at least 0 and less than 1, got {self.ema_decay}")
        return problems


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup):
    """Precision, memory and speed"""

    mixed_precision: str = option("no", "number format of the computation", choices=("no", "fp16", "bf16"))
    full_fp16: bool = option(False, "keep weights and gradients in fp16 too")
    full_bf16: bool = option(False, "keep weights and gradients in bf16 too")
    fp8_base: bool = option(False, "store the base model in 8 bits a weight; it computes as before")
    fp8_base_unet: bool = option(False, "as --fp8_base, but not the text encoders")
    base_quantization: str | None = option(
        None,
        "how the frozen U-Net is rounded: fp8 is --fp8_base_unet; int8 multiplies in 8 bits, for GPUs; "
        "nf4 stores it in 4 bits (QLoRA)",
        choices=("fp8", "int8", "nf4"),
    )
    gradient_checkpointing: bool = option(False, "save memory by computing parts of the forward pass twice")
    cpu_offload_checkpointing: bool = option(
        False, "keep what --gradient_checkpointing keeps in the computer's main memory"
    )
    blocks_to_swap: int | None = option(
        None, "largest blocks of the U-Net that wait in main memory, and are on the GPU only while they are at work"
    )
    xformers: bool = option(False, "use the attention of the package xformers")
    sdpa: bool = option(False, "use PyTorch's scaled dot product attention")
    mem_eff_attn: bool = option(False, "use a slow attention that needs little memory")
    torch_compile: bool = option(False, "compile the U-Net with torch.compile")
    dynamo_backend: str = option("inductor", "backend of --torch_compile", choices=DYNAMO_BACKENDS)
    cuda_graphs: bool = option(
        False, "record a training step for each size of batch and have the GPU repeat it in one launch"
    )
    fused_kernels: bool = option(
        False,
        "compute the U-Net's norms, SiLU and GEGLU by Triton kernels; for NVIDIA GPUs",
    )
    no_onednn: bool = option(False, "on a CPU, compute frozen layers as PyTorch does by itself; slower")
    deterministic: bool = option(False, "two runs on the same machine give the same bits; may be slower; needs --seed")

    def check(self) -> list[str]:
        advice = "it does not promise the same bits every time"
        return [
            *conflict(self, "deterministic", "xformers", advice),
            *conflict(self, "deterministic", "torch_compile", advice),
            *conflict(self, "blocks_to_swap", "torch_compile", "compiled code wants weights that stay"),
            *conflict(self, "fused_kernels", "torch_compile", "a compiler fuses these operations itself"),
            *at_least(self, 0, "blocks_to_swap"),
            *(
                text
                for name in ("fp8_base", "fp8_base_unet")
                if self.base_quantization != "fp8"
                for text in conflict(self, "base_quantization", name, "each stores the U-Net in a way of its own")
            ),
            *(
                f"--full_{name} needs --mixed_precision {name}, got {self.mixed_precision}"
                for name in ("fp16", "bf16")
                if getattr(self, f"full_{name}") and self.mixed_precision != name
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(OptionGroup):
    """Logs"""

    console_log_level: str | None = option(
        None, "least important messages to show", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = option(None, "file for messages, instead of the console", flag_type="path")
    console_log_simple: bool = option(False, "show messages without colours and columns")
    logging_dir: str | None = option(None, "folder for loss curves; none are kept when not given", flag_type="path")
    log_with: str | None = option(
        None,
        "where curves and sample pictures go; tensorboard when only --logging_dir is given",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, "start of the name of a run's folder in --logging_dir")
    log_tracker_name: str | None = option(None, "name of the tracker, network_train when not given")
    log_tracker_config: str | None = option(
        None, "TOML file with tables [tensorboard] and [wandb]: what these are started with", flag_type="path"
    )
    log_config: bool = option(False, "write all settings into the curves' log")
    wandb_run_name: str | None = option(None, "name of the run on wandb")
    wandb_api_key: str | None = option(
        None, "access key for wandb; WANDB_API_KEY or a login when not given", is_secret=True
    )

    def check(self) -> list[str]:
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            return [f"--log_with {self.log_with} needs --logging_dir, the folder for the curves"]
        return [
            problem
            for name in ("log_prefix", "log_tracker_name")
            for problem in name_below(name, getattr(self, name), "logging_dir")
        ]


@dataclass(frozen=True, kw_only=True)
class DistributedOptions(OptionGroup):
    """Several GPUs"""

    ddp_timeout: int | None = option(
        None, "minutes that one process waits for the others, PyTorch's own when not given"
    )
    ddp_gradient_as_bucket_view: bool = option(False, "let gradients share memory with the exchange between processes")
    ddp_static_graph: bool = option(False, "tell DistributedDataParallel that the graph never changes")
    deepspeed: bool = option(False, "train with DeepSpeed")
    zero_stage: int = option(2, "ZeRO stage of DeepSpeed", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(None, "where DeepSpeed keeps the optimizer", choices=("cpu", "nvme"))
    offload_optimizer_nvme_path: str | None = option(None, "folder on NVMe for the optimizer", flag_type="path")
    offload_param_device: str | None = option(None, "where DeepSpeed keeps parameters", choices=("cpu", "nvme"))
    offload_param_nvme_path: str | None = option(None, "folder on NVMe for parameters", flag_type="path")
    zero3_init_flag: bool = option(False, "split models while loading, ZeRO stage 3")
    zero3_save_16bit_model: bool = option(False, "save models in 16 bits, ZeRO stage 3")
    fp16_master_weights_and_gradients: bool = option(False, "keep DeepSpeed's master weights in fp16")

    def check(self) -> list[str]:
        return at_least(self, 0, "ddp_timeout")


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OptionGroup):
    """Configuration file"""

    config_file: str | None = option(
        None, "TOML or JSON file of options; what is given on the command line goes first", flag_type="path"
    )
    output_config: bool = option(False, "write the options of the command line to --config_file and stop")
    strict_config: bool = option(False, "an unknown key in --config_file is an error, not a warning")
    dry_run: bool = option(
        False,
        "check everything, print what was found of dataset, steps and disks, run one step of the largest batch, print "
        "its time and memory and what would save memory, and stop; nothing is saved but what is known of the pictures",
    )

    def check(self) -> list[str]:
        if self.output_config and not self.config_file:
            return ["--output_config needs --config_file, the file to write"]
        if self.output_config and self.config_file.lower().endswith(".json"):
            return [f"--output_config writes TOML: --config_file must end in .toml, got {self.config_file}"]
        return []


@dataclass(frozen=True, kw_only=True)
class TrainNetworkOptions(
    ModelOptions,
    DatasetOptions,
    NetworkOptions,
    OptimizerOptions,
    SchedulerOptions,
    LoopOptions,
    DenoisingOptions,
    PrecisionOptions,
    SamplingOptions,
    SavingOptions,
    LoggingOptions,
    DistributedOptions,
    ConfigOptions,
):
    """Train a LoRA or a similar network on pictures"""

    def check(self) -> list[str]:
        return [
            *self._check_velocity(),
            *self._check_warmup(),
            *self._check_something_trains(),
            *self._check_text_cache(),
            *self._check_resume(),
            *self._check_deterministic(),
            *self._check_average(),
        ]

    def _check_average(self) -> list[str]:
        if self.ema and is_schedule_free(optimizer_name(self)):
            return [f"--ema does not go with --optimizer_type {optimizer_name(self)}, which has an average of its own"]
        return []

    def _check_deterministic(self) -> list[str]:
        if self.deterministic and self.seed is None and not self.resume:
            return ["--deterministic needs --seed, for example 42: without it every run draws its own"]
        return []

    def _check_resume(self) -> list[str]:
        if not self.resume_from_huggingface:
            return [] if resumes_newest(self) else existing_dir("resume", self.resume)
        if not self.resume:
            return ["--resume_from_huggingface needs --resume OWNER/REPO/FOLDER, the state's place on Hugging Face"]
        return problems_of(hub_place, self.resume)

    def _check_velocity(self) -> list[str]:
        problems = conflict(self, "v_pred_like_loss", "v_parameterization", "it is for models that predict noise")
        if self.scale_v_pred_loss_like_noise_pred and not self.v_parameterization:
            problems.append("--scale_v_pred_loss_like_noise_pred needs --v_parameterization")
        return problems

    def _check_warmup(self) -> list[str]:
        if self.lr_warmup_steps <= 0 or is_schedule_free(optimizer_name(self)):
            return []
        if self.lr_scheduler_type:
            return ["--lr_warmup_steps does not go with --lr_scheduler_type: use --lr_scheduler_args of the class"]
        if self.lr_scheduler.partition(":")[0] in ("constant", "adafactor"):
            return [f"--lr_warmup_steps does not go with --lr_scheduler {self.lr_scheduler}: try constant_with_warmup"]
        return []

    def _check_text_cache(self) -> list[str]:
        frozen = self.network_train_unet_only or not any(self.text_encoder_lr or [self.learning_rate])
        if frozen or not caches_text(self):
            return []
        flag = "cache_text_encoder_outputs" + ("" if self.cache_text_encoder_outputs else "_to_disk")
        return [f"--{flag} is for text encoders that are not trained: give --network_train_unet_only"]

    def _check_something_trains(self) -> list[str]:
        if trained_rates(self) or (self.network_train_unet_only and self.network_train_text_encoder_only):
            return []
        return ["--learning_rate, --unet_lr and --text_encoder_lr leave nothing to train: all are 0"]
