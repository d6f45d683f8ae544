"""What only torch knows of a benchmark, printed as JSON: its version, the GPU, and the arithmetic of one step.

python tools/benchmarks/torch_facts.py FOLDER RESOLUTION BATCH RANK
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks.diffusers_loop import adapted_layers


def step_flops(folder: Path, resolution: int, batch: int, rank: int) -> int:
    """Of forward and backward through the U-Net with a LoRA, counted on the meta device; nothing is computed twice."""
    config = UNet2DConditionModel.load_config(folder / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted_layers(unet)))
        noisy = torch.empty(batch, 4, resolution // 8, resolution // 8)
        hidden = torch.empty(batch, 77, config["cross_attention_dim"])
        added = None
        if config["addition_embed_type"]:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
        with FlopCounterMode(display=False) as counter:
            unet(noisy, torch.zeros(batch), hidden, added_cond_kwargs=added).sample.mean().backward()
    return counter.get_total_flops()


def main(folder: str, resolution: str, batch: str, rank: str) -> None:
    facts = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "step_flops": step_flops(Path(folder), int(resolution), int(batch), int(rank)),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
