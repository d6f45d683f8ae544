"""What makes a run need less memory, in the order of what it costs. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field

from library.options.derived import caches_latents, optimizer_name
from library.options.groups import TrainNetworkOptions

Asked = Callable[[TrainNetworkOptions], bool]


@dataclass(frozen=True)
class Saver:
    """One way to need less memory, and whether a run takes it already."""

    advice: str
    is_taken: Asked = lambda options: False
    fields: dict[str, object] = field(default_factory=dict)  # options that take it; empty where it is not one value
    label: str = ""  # for tables, where the advice is too long

    @property
    def name(self) -> str:
        return self.label or self.advice


# of the device that trains; the first rows cost nothing, the last ones quality
TRAINING = (
    Saver("--cache_latents", caches_latents, {"cache_latents": True}),
    Saver(
        "--mixed_precision bf16 or fp16",
        lambda options: options.mixed_precision != "no",
        {"mixed_precision": "bf16"},
    ),
    Saver(
        "--optimizer_type AdamW8bit",
        lambda options: "8bit" in optimizer_name(options).lower(),
        {"optimizer_type": "AdamW8bit", "use_8bit_adam": False},
    ),
    Saver(
        "--network_train_unet_only",
        lambda options: options.network_train_unet_only,
        {"network_train_unet_only": True, "network_train_text_encoder_only": False},
    ),
    Saver(
        "--gradient_checkpointing",
        lambda options: options.gradient_checkpointing,
        {"gradient_checkpointing": True},
    ),
    Saver(
        "a smaller --train_batch_size with as many more --gradient_accumulation_steps",
        lambda options: options.train_batch_size == 1 and not options.dataset_config,
        {"train_batch_size": 1},
        "--train_batch_size 1",
    ),
    Saver(
        "--fp8_base",
        lambda options: options.fp8_base or bool(options.base_quantization),
        {"fp8_base": True, "mixed_precision": "bf16"},
    ),
    Saver(
        "--cpu_offload_checkpointing",
        lambda options: options.cpu_offload_checkpointing,
        {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
    ),
    Saver(
        "--base_quantization nf4",
        lambda options: options.base_quantization == "nf4",
        {"base_quantization": "nf4", "fp8_base": False, "fp8_base_unet": False, "mixed_precision": "bf16"},
    ),
    Saver("--blocks_to_swap", lambda options: bool(options.blocks_to_swap)),
    Saver("--full_bf16", lambda options: options.full_bf16, {"full_bf16": True, "mixed_precision": "bf16"}),
    Saver("a smaller --network_dim", lambda options: options.dim_from_weights),
    Saver("a smaller --resolution"),
)
LOADING = tuple(
    saver for saver in TRAINING if saver.advice.startswith(("--mixed_precision", "--fp8_base", "--base", "--blocks"))
)
CACHING = (
    Saver("--vae_batch_size 1", lambda options: options.vae_batch_size == 1),
    *(saver for saver in TRAINING if saver.advice.startswith(("--mixed_precision", "a smaller --resolution"))),
)
PREVIEWS = (Saver("smaller sizes in --sample_prompts (--w, --h)"),)
# of the computer, whatever trains
MAIN_MEMORY = (
    Saver("fewer other programs at the same time"),
    Saver("--max_data_loader_n_workers 0", lambda options: options.max_data_loader_n_workers == 0),
    Saver("--cache_latents_to_disk", lambda options: options.cache_latents_to_disk),
)


def advice(savers: tuple[Saver, ...], options: TrainNetworkOptions) -> list[str]:
    """What is left to try, the cheapest first."""
    return [saver.advice for saver in savers if not saver.is_taken(options)]
