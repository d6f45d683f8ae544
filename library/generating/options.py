"""The flags of gen_img.py and sdxl_gen_img.py, and which of them are not acted on. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from library.options.checks import above_zero, at_least, existing_dir, existing_file, shares
from library.options.fields import REQUIRED, OptionGroup, flags_of, option
from library.options.groups import MAX_SEED, SAMPLERS

_CONTROL = "ControlNet is not part of this suite"
_DEEP_SHRINK = "Deep Shrink is not part of this suite; --highres_fix_scale makes large pictures"
_GRADUAL = "gradual latents are not part of this suite; --highres_fix_scale makes large pictures"
_NOISE = "noise at the start is the plain one of the seed"
_IMAGE = "pictures begin from noise, or from --image_path"

# flag -> why it cannot be had; without it another picture would be drawn than was asked for
REFUSED = {
    **dict.fromkeys(("control_net_lllite_models", "control_net_models", "control_net_preps"), _CONTROL),
    **dict.fromkeys(("control_net_multipliers", "control_net_ratios", "guide_image_path"), _CONTROL),
    **dict.fromkeys(("ds_depth_1", "ds_timesteps_1", "ds_depth_2", "ds_timesteps_2", "ds_ratio"), _DEEP_SHRINK),
    **dict.fromkeys(("gradual_latent_timesteps", "gradual_latent_ratio", "gradual_latent_ratio_step"), _GRADUAL),
    **dict.fromkeys(("gradual_latent_every_n_steps", "gradual_latent_s_noise"), _GRADUAL),
    "gradual_latent_unsharp_params": _GRADUAL,
    **dict.fromkeys(("noise_offset_prob", "noise_offset_range", "pyramid_noise_prob"), _NOISE),
    "pyramid_noise_discount_range": _NOISE,
    "mask_path": f"inpainting is not part of this suite: {_IMAGE}",
    "clip_vision_strength": f"pictures are no prompts here: {_IMAGE}",
    "network_regional_mask_max_color_codes": "networks apply to the whole picture",
    "textual_inversion_embeddings": "textual inversion is not part of this suite",
    "from_module": "prompts come from --prompt, --from_file or --interactive, where {a|b|c} draws variants",
    "prompter_module_args": "it belongs to --from_module, which is not supported",
    "highres_fix_upscaler": "the first picture is enlarged by Lanczos, or as latents",
    "highres_fix_upscaler_args": "it belongs to --highres_fix_upscaler, which is not supported",
    "zero_terminal_snr": "the samplers' noise schedule is that of training previews",
    "force_scheduler_zero_steps_offset": "the samplers' steps are those of training previews",
}

# flag -> what happens anyway
NO_EFFECT = {
    "no_preview": "no windows are opened",
    "tokenizer_cache_dir": "the tokenizer comes with this suite",
    "vae_batch_size": "the VAE decodes one picture at a time",
    "vae_slices": "the VAE decodes one picture at a time",
    "max_embeddings_multiples": "as many passes of 75 tokens are made as the prompt needs, at most 3",
    "network_pre_calc": "give --network_merge for networks that cost nothing while drawing",
    "highres_fix_disable_control_net": "there is no ControlNet",
    "sdpa": "PyTorch's own attention is always used",
}

# flag -> the flag without which it says nothing
NEEDS = {
    "strength": "image_path",
    "use_original_file_name": "image_path",
    "highres_fix_strength": "highres_fix_scale",
    "highres_fix_save_1st": "highres_fix_scale",
    "highres_fix_latents_upscaling": "highres_fix_scale",
    "network_args": "network_weights",
    "network_merge": "network_weights",
    "network_merge_n_models": "network_weights",
    "network_show_meta": "network_weights",
}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(OptionGroup):
    """Model"""

    ckpt: str = option(REQUIRED, "the model: a .safetensors or .ckpt file, or a diffusers folder", flag_type="path")
    vae: str | None = option(None, "file or folder of a VAE to use instead of the model's own", flag_type="path")
    v1: bool = option(False, "the model is Stable Diffusion 1.x")
    v2: bool = option(False, "the model is Stable Diffusion 2.x")
    sdxl: bool = option(False, "the model is Stable Diffusion XL")
    v_parameterization: bool = option(False, "the model predicts velocity (v) instead of noise")
    zero_terminal_snr: bool = option(False, "begin with noise alone")
    tokenizer_cache_dir: str | None = option(None, "folder that keeps tokenizer files", flag_type="path")
    clip_skip: int | None = option(None, "take the text encoder's layer N from the end; 1 is the last")
    max_embeddings_multiples: int | None = option(None, "most passes of 75 tokens for a prompt")
    fp16: bool = option(False, "compute in fp16, on a GPU")
    bf16: bool = option(False, "compute in bf16")
    no_half_vae: bool = option(False, "keep the VAE in float32 with --fp16 and --bf16")
    xformers: bool = option(False, "use the attention of xformers")
    diffusers_xformers: bool = option(False, "the same as --xformers")
    sdpa: bool = option(False, "use PyTorch's own attention, which is the default")
    opt_channels_last: bool = option(False, "keep the U-Net's weights in channels-last order")
    vae_batch_size: float | None = option(None, "pictures that the VAE decodes at once")
    vae_slices: int | None = option(None, "slices in which the VAE decodes")

    def check(self) -> list[str]:
        problems = at_least(self, 1, "clip_skip")
        if self.vae and not Path(self.vae).exists():
            problems.append(f"--vae: there is no file or folder {self.vae}")
        if self.fp16 and self.bf16:
            problems.append("--fp16 does not go with --bf16: give one")
        return problems


@dataclass(frozen=True, kw_only=True)
class NetworkFlags(OptionGroup):
    """Networks"""

    network_module: list[str] | None = option(None, "algorithm of each network; what its file tells when not given")
    network_weights: list[str] | None = option(None, "files of networks, all applied together", flag_type="path")
    network_mul: list[float] | None = option(None, "multiplier of each network; 1 when not given")
    network_args: list[str] | None = option(None, "further arguments of each network: key=value;key=value")
    network_show_meta: bool = option(False, "print the metadata of the networks")
    network_merge: bool = option(False, "merge the networks into the model: faster, and --am has no effect")
    network_merge_n_models: int | None = option(None, "merge only the first N networks")
    network_pre_calc: bool = option(False, "compute the changes of the weights beforehand")
    network_regional_mask_max_color_codes: int | None = option(None, "regions of networks")
    textual_inversion_embeddings: list[str] | None = option(None, "files of embeddings", flag_type="path")

    def check(self) -> list[str]:
        count, problems = len(self.network_weights or []), []
        for name in ("network_module", "network_mul", "network_args"):
            given = len(getattr(self, name) or [])
            if given > count and not (given == 1 and name == "network_module"):
                problems.append(f"--{name} has {given} values for {count} files of --network_weights")
        for path in self.network_weights or []:
            problems += existing_file("network_weights", path)
        if self.network_merge_n_models is not None and not 0 < self.network_merge_n_models <= count:
            problems.append(f"--network_merge_n_models must be 1 to {count}, got {self.network_merge_n_models}")
        return problems


@dataclass(frozen=True, kw_only=True)
class PromptFlags(OptionGroup):
    """Prompts"""

    prompt: str | None = option(None, "the prompt; options may follow: --n --w --h --s --d --l --t --am ...")
    from_file: str | None = option(None, "UTF-8 file of prompts, one a line", flag_type="path")
    interactive: bool = option(False, "ask for prompts until an empty one is given")
    wildcard_dir: str | None = option(
        None, "folder of .txt files: __name__ in a prompt becomes a line of name.txt", flag_type="path"
    )
    shuffle_prompts: bool = option(False, "put the prompts into a random order in each round")
    n_iter: int = option(1, "rounds through all prompts")
    images_per_prompt: int = option(1, "pictures of each prompt in a round")
    seed: int | None = option(None, "seed of the picture; of several, what their seeds are drawn from")
    iter_same_seed: bool = option(False, "all prompts of a round get the same seed")
    emb_normalize_mode: str = option(
        "original", "how weights in prompts are balanced", choices=("original", "none", "abs")
    )

    def check(self) -> list[str]:
        given = [name for name in ("prompt", "from_file", "interactive") if getattr(self, name)]
        problems = existing_file("from_file", self.from_file) + existing_dir("wildcard_dir", self.wildcard_dir)
        if len(given) != 1:
            named = " and ".join(f"--{name}" for name in given)
            problems.append(f"one of --prompt, --from_file and --interactive says what to draw, got {named or 'none'}")
        if not 0 <= (self.seed or 0) <= MAX_SEED:
            problems.append(f"--seed must be between 0 and {MAX_SEED}, got {self.seed}")
        if self.emb_normalize_mode != "original":
            problems.append(f"--emb_normalize_mode {self.emb_normalize_mode} is not supported: only original is")
        return problems + at_least(self, 1, "n_iter", "images_per_prompt")


@dataclass(frozen=True, kw_only=True)
class PictureFlags(OptionGroup):
    """Pictures"""

    W: int | None = option(None, "width in pixels; the model's usual size when not given")
    H: int | None = option(None, "height in pixels; the model's usual size when not given")
    steps: int = option(50, "steps of the sampler")
    scale: float = option(7.5, "scale of classifier-free guidance")
    negative_scale: float | None = option(None, "guide away from the negative prompt with a scale of its own")
    sampler: str = option("ddim", "sampler", choices=SAMPLERS)
    batch_size: int = option(1, "pictures drawn at once; pictures of a batch may differ in the last bits")
    image_path: str | None = option(None, "picture to begin with, or a folder of them", flag_type="path")
    strength: float | None = option(None, "how much of --image_path is drawn anew, 0 to 1; 0.8 when not given")
    highres_fix_scale: float | None = option(None, "draw at this share of the size first, and enlarge, e.g. 0.5")
    highres_fix_steps: int = option(28, "steps of the first, small picture")
    highres_fix_strength: float | None = option(None, "how much of the enlarged picture is drawn anew, 0 to 1")
    highres_fix_save_1st: bool = option(False, "write the small pictures too")
    highres_fix_latents_upscaling: bool = option(False, "enlarge latents, not pixels")
    original_width: int | None = option(None, "SDXL: width of the original, that of the picture when not given")
    original_height: int | None = option(None, "SDXL: height of the original")
    original_width_negative: int | None = option(None, "SDXL: the same for the negative prompt")
    original_height_negative: int | None = option(None, "SDXL: the same for the negative prompt")
    crop_left: int | None = option(None, "SDXL: left edge of the crop, 0 when not given")
    crop_top: int | None = option(None, "SDXL: top edge of the crop, 0 when not given")

    def check(self) -> list[str]:
        problems = at_least(self, 1, "steps", "batch_size", "highres_fix_steps", "original_width", "original_height")
        problems += at_least(self, 0, "crop_left", "crop_top") + at_least(self, 64, "W", "H")
        problems += above_zero(self, "highres_fix_scale")
        given = [name for name in ("strength", "highres_fix_strength") if getattr(self, name) is not None]
        problems += shares(self, *given)
        if self.image_path and not Path(self.image_path).exists():
            problems.append(f"--image_path: there is no file or folder {self.image_path}")
        return problems


@dataclass(frozen=True, kw_only=True)
class OutputFlags(OptionGroup):
    """Files"""

    outdir: str = option("outputs", "folder for the pictures; made if it is not there", flag_type="path")
    sequential_file_name: bool = option(False, "number the files on from those that are there, instead of dates")
    use_original_file_name: bool = option(False, "give pictures the names of those in --image_path")
    no_preview: bool = option(False, "open no window")

    def check(self) -> list[str]:
        return [f"--outdir must be a folder, but {self.outdir} is a file"] if Path(self.outdir).is_file() else []


@dataclass(frozen=True, kw_only=True)
class UnsupportedFlags(OptionGroup):
    """Not in this suite: each is refused, with the reason"""

    mask_path: str | None = option(None, "mask for inpainting", flag_type="path")
    clip_vision_strength: float | None = option(None, "strength of a picture as prompt")
    guide_image_path: list[str] | None = option(None, "pictures for ControlNet", flag_type="path")
    highres_fix_upscaler: str | None = option(None, "module that enlarges")
    highres_fix_upscaler_args: str | None = option(None, "its arguments")
    highres_fix_disable_control_net: bool = option(False, "ControlNet for the small picture alone")
    control_net_lllite_models: list[str] | None = option(None, "ControlNet-LLLite files", flag_type="path")
    control_net_multipliers: list[float] | None = option(None, "ControlNet multipliers")
    control_net_ratios: list[float] | None = option(None, "ControlNet shares of the steps")
    control_net_models: list[str] | None = option(None, "ControlNet files", flag_type="path")
    control_net_preps: list[str] | None = option(None, "ControlNet preprocessors")
    from_module: str | None = option(None, "module that makes prompts")
    prompter_module_args: str | None = option(None, "its arguments")
    force_scheduler_zero_steps_offset: bool = option(False, "let samplers end at timestep 0")
    noise_offset_prob: float | None = option(None, "share of pictures that begin with offset noise")
    noise_offset_range: list[float] | None = option(None, "range of that offset")
    pyramid_noise_prob: float | None = option(None, "share of pictures that begin with pyramid noise")
    pyramid_noise_discount_range: list[float] | None = option(None, "range of its discount")
    ds_depth_1: int | None = option(None, "Deep Shrink")
    ds_timesteps_1: int = option(650, "Deep Shrink")
    ds_depth_2: int | None = option(None, "Deep Shrink")
    ds_timesteps_2: int = option(650, "Deep Shrink")
    ds_ratio: float = option(0.5, "Deep Shrink")
    gradual_latent_timesteps: int | None = option(None, "gradual latents")
    gradual_latent_ratio: float = option(0.5, "gradual latents")
    gradual_latent_ratio_step: float = option(0.125, "gradual latents")
    gradual_latent_every_n_steps: int = option(3, "gradual latents")
    gradual_latent_s_noise: float = option(1.0, "gradual latents")
    gradual_latent_unsharp_params: str | None = option(None, "gradual latents")


@dataclass(frozen=True, kw_only=True)
class ConsoleFlags(OptionGroup):
    """Messages"""

    console_log_level: str | None = option(
        None, "least important messages to show", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = option(None, "file for messages, instead of the console", flag_type="path")
    console_log_simple: bool = option(False, "show messages without colours and columns")


@dataclass(frozen=True, kw_only=True)
class DrawOptions(ModelFlags, NetworkFlags, PromptFlags, PictureFlags, OutputFlags, UnsupportedFlags, ConsoleFlags):
    """Draw pictures from prompts, with any number of networks applied"""

    def check(self) -> list[str]:
        flags = flags_of(type(self))
        refused = [name for name in REFUSED if name in flags and getattr(self, name) != flags[name].default]
        problems = [f"--{name} is not supported: {REFUSED[name]}" for name in refused]
        problems += [
            f"--{name} needs --{needed}"
            for name, needed in NEEDS.items()
            if getattr(self, name) != flags[name].default and not getattr(self, needed)
        ]
        return problems

    def warnings(self) -> list[str]:
        """A sentence for each flag that is set and has no effect."""
        flags = flags_of(type(self))
        given = [name for name in NO_EFFECT if getattr(self, name) != flags[name].default]
        return [f"--{name} has no effect: {NO_EFFECT[name]}" for name in given]
