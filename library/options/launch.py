"""What `accelerate launch` was told, where this suite goes by its own options."""

import os
from typing import Any

OTHER_ENGINES = {
    "DEEPSPEED": "DeepSpeed",
    "FSDP": "FSDP",
    "MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG": "a parallelism of its own (parallelism_config)",
}


def launch_problems() -> list[str]:
    """A sentence for each way of splitting a model over GPUs that accelerate is set up for."""
    return [
        f"accelerate is set up for {name}, which is not supported: use accelerate launch --multi_gpu, "
        "or run `accelerate config` again"
        for key, name in OTHER_ENGINES.items()
        if os.environ.get(f"ACCELERATE_USE_{key}", "").lower() == "true"
    ]


def launch_warnings(options: Any) -> list[str]:
    """A sentence for each setting of the launcher that says something else than the options of the script."""
    ours = {
        "mixed_precision": options.mixed_precision,
        "dynamo_backend": options.dynamo_backend if options.torch_compile else "no",
        "gradient_accumulation_steps": str(options.gradient_accumulation_steps),
    }
    asked = {name: os.environ.get(f"ACCELERATE_{name.upper()}", "").lower() for name in ours}
    return [
        f"accelerate launch --{name} {asked[name]} has no effect: the script's own options say {value}"
        for name, value in ours.items()
        if asked[name] not in ("", "no", "1", value)
    ]
