"""What the layers of adapter files are called, and what their names tell. Needs no torch."""

import re

# What other programs' names begin with, and kohya's.
PREFIXES = {
    "unet.": "lora_unet_",
    "diffusion_model.": "lora_unet_",
    "text_encoder_2.": "lora_te2_",
    "text_encoder.": "lora_te1_",
    "oft_unet_": "lora_unet_",
    "lycoris_": "lora_unet_",
}
CONVOLUTIONS = re.compile(r"_(conv[12]?|conv_in|conv_out|op|in_layers_2|out_layers_3)$|_input_blocks_0_0$|_out_2$")
POINTWISE = re.compile(r"_(conv_shortcut|skip_connection)$|^lora_unet_(down|mid|up)_block.*_proj_(in|out)$")


def kohya_name(name: str) -> str:
    """A layer's name as kohya's networks have it, where it is spelled by diffusers, PEFT or LyCORIS."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    name = name.replace(".", "_")
    return f"{name}_0" if name.endswith("_to_out") else name


def kernel_of(name: str) -> tuple[int, ...]:
    """The kernel of a layer, () for a Linear, as Stable Diffusion's U-Nets have it under this name."""
    if CONVOLUTIONS.search(name):
        return (3, 3)
    return (1, 1) if POINTWISE.search(name) else ()
