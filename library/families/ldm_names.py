"""The names of a U-Net's layers in the LDM layout. Needs no torch."""

import re

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def unet_name_in_file(name: str, layers_per_block: int, num_attended: tuple[bool, ...] = ()) -> str:
    """A diffusers U-Net name as the LDM layout spells it (without prefix).

    `num_attended` tells for every up block whether it has attention (the upsampler's number depends on it).
    """
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return _resnet_name(theirs + name[len(ours) :])
    match = re.fullmatch(r"(?:down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} has no place in the LDM layout")
    block, kind, index, rest = int(match[1]), *match.groups()[1:]
    if name.startswith("down"):
        position = 1 + block * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{position + layers_per_block}.0.op.{rest.removeprefix('conv.')}"
        stem = f"input_blocks.{position + int(index)}"
    else:
        position = block * (layers_per_block + 1)
        if kind == "upsamplers":
            return f"output_blocks.{position + layers_per_block}.{2 if num_attended[block] else 1}.{rest}"
        stem = f"output_blocks.{position + int(index)}"
    return _resnet_name(f"{stem}.{0 if kind == 'resnets' else 1}.{rest}")


def _resnet_name(name: str) -> str:
    for ours, theirs in RESNET_NAMES.items():
        head, found, tail = name.partition(f".{ours}.")
        if found and ".transformer_blocks." not in head:
            return f"{head}.{theirs}.{tail}"
    return name
