"""What a network file tells of its making: kohya's ss_ fields and the modelspec.

Every value is the `str` of a Python value, so that WebUI, ComfyUI and the metadata editors read it as they are used to.
"""

import base64
import json
import mimetypes
import random
import time
from datetime import datetime
from pathlib import Path

from library.dataset.dataset import TrainingDataset
from library.options.derived import learning_rates, network_arguments, network_module, resolution_wh
from library.options.groups import TrainNetworkOptions
from library.training.dataset_metadata import dataset_fields
from library.training.model_hashes import ModelHashes
from library.training.optimizers import OptimizerSpec
from library.training.plan import StepPlan

IMPLEMENTATION_VERSION = "athanor/0.1.0"

# options that are recorded as they were given, under their name with ss_ before it
RECORDED_OPTIONS = [
    "learning_rate", "gradient_checkpointing", "gradient_accumulation_steps", "lr_warmup_steps",
    "network_dim", "network_alpha", "network_dropout", "mixed_precision", "full_fp16", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "face_crop_aug_range",
    "prior_loss_weight", "min_snr_gamma", "scale_weight_norms", "ip_noise_gamma", "noise_offset_random_strength",
    "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_scale", "huber_c", "fp8_base",
    "fp8_base_unet", "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "resize_interpolation", "output_name", "lr_scheduler",
]  # fmt: skip
WITHOUT_DETAILS = [
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
]  # fmt: skip
MODELSPEC_OPTIONS = [
    "author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
    "is_negative_embedding",
]  # fmt: skip


class TrainingMetadata:
    """The fields known when training starts, completed at each save."""

    def __init__(
        self,
        options: TrainNetworkOptions,
        family_metadata: dict[str, str],
        dataset: TrainingDataset,
        optimizer: str,
        spec: OptimizerSpec,
        plan: StepPlan,
    ):
        self.options = options
        self.hashes = ModelHashes(options)
        self.started_at = time.time()
        self.cover: dict[str, str] = {}  # a picture for programs to show
        self.modelspec = {k: v for k, v in family_metadata.items() if k.startswith("modelspec.")}
        self.fields: dict[str, object] = {f"ss_{name}": getattr(options, name) for name in RECORDED_OPTIONS}
        self.fields |= {k: v for k, v in family_metadata.items() if k.startswith("ss_")}
        self.fields |= run_fields(options, plan) | {"ss_optimizer": optimizer}
        self.fields |= dataset_fields(dataset, options, plan)
        self.fields["ss_training_started_at"] = self.started_at
        if spec.relative_step:
            self.fields["ss_lr_scheduler"] = f"adafactor:{options.learning_rate}"
        if options.network_args:
            arguments = network_arguments(options)
            arguments.setdefault("dropout", options.network_dropout)
            self.fields["ss_network_args"] = json.dumps(arguments)

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """All metadata of a file saved now; `epoch` as kohya counts it for this kind of file."""
        finished = {"ss_training_finished_at": time.time(), "ss_steps": step, "ss_epoch": epoch}
        fields = {name: str(value) for name, value in (self.fields | self.hashes.fields() | finished).items()}
        if self.options.no_metadata:
            fields = {name: value for name, value in fields.items() if name in WITHOUT_DETAILS}
        return fields | self._modelspec() | self.cover

    def _modelspec(self) -> dict[str, str]:
        options = self.options
        title = options.metadata_title or options.output_name or f"LoRA@{self.started_at}"
        spec = {
            "modelspec.sai_model_spec": "1.0.1",
            **self.modelspec,
            "modelspec.architecture": f"{self.modelspec['modelspec.architecture']}/lora",
            "modelspec.implementation_version": IMPLEMENTATION_VERSION,
            "modelspec.title": title,
            "modelspec.date": datetime.now().isoformat(timespec="seconds"),
        }
        if options.resolution is not None:
            spec["modelspec.resolution"] = "{}x{}".format(*resolution_wh(options))
        for name in MODELSPEC_OPTIONS:
            value = getattr(options, f"metadata_{name}")
            if value is not None:
                spec[f"modelspec.{name}"] = str(value)
        if options.metadata_thumbnail:
            spec["modelspec.thumbnail"] = thumbnail_url(options.metadata_thumbnail)
        if options.min_timestep is not None or options.max_timestep is not None:
            spec["modelspec.timestep_range"] = f"{options.min_timestep or 0},{options.max_timestep or 1000}"
        if options.clip_skip is not None:
            spec["modelspec.encoder_layer"] = str(options.clip_skip)
        return spec


def thumbnail_url(text: str) -> str:
    """The picture as a data URL; a text that is one already stays."""
    if text.startswith("data:"):
        return text
    kind = mimetypes.guess_type(text)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(text).read_bytes()).decode('ascii')}"


def run_fields(options: TrainNetworkOptions, plan: StepPlan) -> dict[str, object]:
    text_encoder_lr, unet_lr = learning_rates(options)
    return {
        "ss_session_id": random.SystemRandom().randint(0, 2**32),
        "ss_text_encoder_lr": list(text_encoder_lr) if isinstance(text_encoder_lr, tuple) else text_encoder_lr,
        "ss_unet_lr": unet_lr,
        "ss_network_module": network_module(options),
        "ss_max_train_steps": plan.max_train_steps,
        "ss_num_epochs": plan.num_epochs,
        "ss_num_batches_per_epoch": plan.batches_per_epoch,
        "ss_debiased_estimation": options.debiased_estimation_loss,
        "ss_sd_scripts_commit_hash": "(unknown)",
    }
