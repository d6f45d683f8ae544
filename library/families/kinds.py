"""Every kind of checkpoint that is known by name, how it is known, and what its owner can do. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...] | None]  # of the weights of a file by their names; None where it does not tell

SD_SCALE = 0.18215  # arXiv:2112.10752, appendix G
SDXL_SCALE = 0.13025  # arXiv:2307.01952; of the VAE that SDXL was trained with
ORDINARY = "train on the ordinary model of the same version: its LoRAs work on this one"


def other_script(name: str) -> str:
    return f"kohya's sd-scripts have {name} for it"


@dataclass(frozen=True)
class Kind:
    """What a checkpoint can be."""

    description: str
    advice: str = ""  # what to do where a model to train was wanted and this is none
    vae_scale: float | None = None  # of its VAE, where that fits Stable Diffusion 1.x, 2.x or XL


KINDS = {
    "sd1": Kind("Stable Diffusion 1.x model", vae_scale=SD_SCALE),
    "sd1_inpainting": Kind("Stable Diffusion 1.x inpainting model", ORDINARY, vae_scale=SD_SCALE),
    "sd2": Kind("Stable Diffusion 2.x model", vae_scale=SD_SCALE),
    "sd2_inpainting": Kind("Stable Diffusion 2.x inpainting, depth or upscaling model", ORDINARY, vae_scale=SD_SCALE),
    "sdxl": Kind("Stable Diffusion XL base model", vae_scale=SDXL_SCALE),
    "sdxl_inpainting": Kind("Stable Diffusion XL inpainting model", ORDINARY, vae_scale=SDXL_SCALE),
    "sdxl_refiner": Kind(
        "Stable Diffusion XL refiner",
        "train on the base model; the refiner runs after it without a LoRA",
        vae_scale=SDXL_SCALE,
    ),
    "sd3": Kind("Stable Diffusion 3 model", other_script("sd3_train_network.py")),
    "flux": Kind("FLUX model", other_script("flux_train_network.py")),
    "chroma": Kind("Chroma model", other_script("flux_train_network.py --model_type chroma")),
    "lumina2": Kind("Lumina Image 2 or Z-Image model", other_script("lumina_train_network.py, for Lumina,")),
    "cosmos": Kind("Cosmos Predict 2 or Anima model", other_script("anima_train_network.py, for Anima,")),
    "hunyuan": Kind("Hunyuan image or video model", other_script("hunyuan_image_train_network.py, for images,")),
    "qwen_image": Kind("Qwen-Image model", "kohya's musubi-tuner trains it"),
    "wan": Kind("Wan model", "kohya's musubi-tuner trains it"),
    "hunyuan_dit": Kind("Hunyuan-DiT model"),
    "aura_flow": Kind("AuraFlow model"),
    "cascade": Kind("Stable Cascade model"),
    "pixart": Kind("PixArt model"),
    "unet_only": Kind("U-Net without text encoder", "give the whole checkpoint that it is a part of"),
    "vae": Kind("VAE, not a whole model", "give it as --vae, beside a whole model"),
    "adapter": Kind(
        "LoRA or similar adapter, not a base model",
        "give the model that it was trained on, and the file as --network_weights to train it further",
    ),
    "embedding": Kind("textual-inversion embedding, not a base model"),
    "text_encoder": Kind("text encoder, not a whole model"),
    "unknown": Kind("file whose weights have names that no Stable Diffusion model has"),
}

PIPELINE_KINDS = {
    "StableDiffusionPipeline": "sd1",
    "StableDiffusionImg2ImgPipeline": "sd1",
    "StableDiffusionInpaintPipeline": "sd1_inpainting",
    "StableDiffusionInstructPix2PixPipeline": "sd1_inpainting",
    "StableDiffusionDepth2ImgPipeline": "sd2_inpainting",
    "StableDiffusionUpscalePipeline": "sd2_inpainting",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl_inpainting",
    "StableDiffusionXLImg2ImgPipeline": "sdxl_refiner",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "ChromaPipeline": "chroma",
    "Lumina2Pipeline": "lumina2",
    "ZImagePipeline": "lumina2",
    "Cosmos2TextToImagePipeline": "cosmos",
    "HunyuanImagePipeline": "hunyuan",
    "QwenImagePipeline": "qwen_image",
    "WanPipeline": "wan",
    "HunyuanDiTPipeline": "hunyuan_dit",
    "AuraFlowPipeline": "aura_flow",
    "StableCascadeCombinedPipeline": "cascade",
    "StableCascadePriorPipeline": "cascade",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}

# Parts of names that only one kind of model has; the first that is found counts.
TELLING_NAMES = {
    ".lora_down.": "adapter",
    ".lora_A.": "adapter",
    "hada_w1": "adapter",
    "lokr_w1": "adapter",
    "oft_blocks": "adapter",
    "joint_blocks.0.": "sd3",
    "distilled_guidance_layer.": "chroma",
    "txt_in.individual_token_refiner.": "hunyuan",
    "double_blocks.0.": "flux",
    "context_refiner.0.": "lumina2",
    "mlp_t5.0.": "hunyuan_dit",
    "double_layers.0.": "aura_flow",
    "clip_txt_mapper.": "cascade",
    "transformer_blocks.0.img_mod.": "qwen_image",
    "blocks.0.adaln_modulation_self_attn.": "cosmos",
    "head.modulation": "wan",
    "scale_shift_table": "pixart",
}


def kind_of_shapes(shapes: Shapes) -> str:
    """The kind of model (a key of KINDS) that weights of these names and shapes are."""

    def has(*fragments: str) -> bool:
        return any(all(fragment in name for fragment in fragments) for name in shapes)

    for fragment, kind in TELLING_NAMES.items():
        if has(fragment):
            return kind
    if has("model.diffusion_model.input_blocks."):
        return _kind_of_ldm_unet(shapes, has)
    if has("decoder.conv_in.") and has("encoder.conv_in."):
        return "vae"
    if has("emb_params") or has("string_to_param"):
        return "embedding"
    if has("embeddings.token_embedding") or has("encoder.embed_tokens") or has("shared.weight"):
        return "text_encoder"
    if has("down_blocks.0.") or has("input_blocks.0."):
        return "unet_only"
    return "unknown"


def _kind_of_ldm_unet(shapes: Shapes, has: Callable[..., bool]) -> str:
    first_convolution = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    takes_more = first_convolution and first_convolution[1:2] != (4,)
    if has("conditioner.embedders.1."):
        return "sdxl_inpainting" if takes_more else "sdxl"
    if has("conditioner.embedders.0."):
        return "sdxl_refiner"
    if has("cond_stage_model.model."):
        return "sd2_inpainting" if takes_more else "sd2"
    if not has("cond_stage_model.transformer."):
        return "unet_only"
    return "sd1_inpainting" if takes_more else "sd1"
