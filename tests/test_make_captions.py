"""Captioning models of transformers, built here at toy size with processors and tokenizers of their own."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.models.gpt2 import GPT2Config

from finetune.make_captions_by_git import main as make_captions_by_git
from library.errors import UserError
from tools.make_captions import main

WORDS = ["a", "an", "the", "cat", "dog", "bird", "of", "with", "in", "on", "red", "blue", "green", "photo", "garden"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = {word: place for place, word in enumerate(SPECIAL + WORDS)}
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
TEXT = dict(vocab_size=len(VOCABULARY), pad_token_id=0, bos_token_id=2, eos_token_id=3, sep_token_id=3)
SIDE = 32


def tokenizer_of(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    return BertTokenizer(str(folder / "vocab.txt"))


def word_level() -> Tokenizer:
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return words


def write_blip(folder: Path) -> None:
    torch.manual_seed(0)
    text = SIZES | TEXT | dict(encoder_hidden_size=32, projection_dim=16, max_position_embeddings=128)
    vision = SIZES | dict(image_size=SIDE, patch_size=8, projection_dim=16)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer_of(folder)).save_pretrained(folder)


def write_git(folder: Path) -> None:
    torch.manual_seed(1)
    vision = SIZES | dict(image_size=SIDE, patch_size=8)
    model = GitForCausalLM(GitConfig(vision_config=vision, **SIZES, **TEXT, max_position_embeddings=128))
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    GitProcessor(images, tokenizer_of(folder)).save_pretrained(folder)


def write_vit_gpt2(folder: Path) -> None:
    """A model of two, whose processor and tokenizer no processor joins."""
    torch.manual_seed(2)
    encoder = ViTConfig(**SIZES, image_size=SIDE, patch_size=8)
    decoder = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=2, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    special = dict(unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=word_level(), **special).save_pretrained(folder)


def write_blip2(folder: Path) -> None:
    torch.manual_seed(3)
    image_token = len(VOCABULARY)
    words = tokenizer_of(folder)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = OPTConfig(
        vocab_size=image_token + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48,
        max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=SIZES | dict(image_size=SIDE, patch_size=8),
        tie_word_embeddings=False,
        qformer_config=SIZES | dict(vocab_size=image_token, encoder_hidden_size=32),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=image_token,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    Blip2Processor(images, words, num_query_tokens=4).save_pretrained(folder)


def write_florence2(folder: Path) -> None:
    torch.manual_seed(4)
    words = PreTrainedTokenizerFast(
        tokenizer_object=word_level(), unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    text = dict(
        model_type="bart", vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    vision = dict(
        depths=(1, 1, 1, 1), embed_dim=(8, 16, 32, 32), num_heads=(1, 2, 2, 2), num_groups=(1, 2, 2, 2),
        window_size=4, projection_dim=32,
    )  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=words.image_token_id)
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 1 + (64 // 32) ** 2
    Florence2Processor(images, words).save_pretrained(folder)


CHAT = (
    "{% for message in messages %}{% for item in message.content %}"
    "{% if item.type == 'image' %}<image>{% else %} {{ item.text }}{% endif %}{% endfor %}{% endfor %} photo of"
)


def write_llava(folder: Path) -> None:
    """A model that chats."""
    torch.manual_seed(5)
    words = PreTrainedTokenizerFast(
        tokenizer_object=word_level(), unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    text = LlamaConfig(**SIZES, vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    vision = CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=8, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=words.image_token_id)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    shape = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    LlavaProcessor(images, words, chat_template=CHAT, **shape).save_pretrained(folder)


WRITERS: dict[str, Callable[[Path], None]] = {"blip": write_blip, "git": write_git, "vit-gpt2": write_vit_gpt2}
WRITERS |= {"blip-2": write_blip2, "florence2": write_florence2, "llava": write_llava}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("模型 models")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "照片 pictures"
    (folder / "in").mkdir(parents=True)
    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    Image.new("L", (40, 60), 30).save(folder / "b 灰.png")
    Image.new("RGBA", (50, 50), (0, 0, 255, 90)).save(folder / "in" / "c.png")
    return folder


def captions(folder: Path, extension: str = ".caption") -> list[str]:
    paths = [folder / "a", folder / "b 灰", folder / "in" / "c"]
    return [path.with_name(path.name + extension).read_text(encoding="utf-8") for path in paths]


@pytest.mark.parametrize("kind", WRITERS)
def test_each_kind_of_model_captions_pictures(kind, models, pictures):
    words = [str(pictures), "--caption_weights", str(models / kind), "--recursive", "--batch_size", "2"]
    limits = ["--max_length", "6", "--min_length", "6", "--caption_prefix", "xx, ", "--caption_extension", "txt"]
    main([*words, *limits, "--beam_search", "--num_beams", "2"])
    made = captions(pictures, ".txt")
    for caption in made:
        assert re.fullmatch(r"xx, .*\n", caption) and not any(word in caption for word in ("[PAD]", "[SEP]", "[CLS]"))
        assert 1 < len(caption.split()) <= 1 + 6  # without the question, where there was one
        assert set(caption.split()[1:]) <= VOCABULARY.keys()
    (pictures / "a.txt").write_text("mine", encoding="utf-8")
    main([*words, *limits])
    assert captions(pictures, ".txt") == ["mine", *made[1:]]
    main([*words, *limits, "--overwrite", "--beam_search", "--num_beams", "2"])
    assert captions(pictures, ".txt") == made


def test_what_is_drawn_depends_on_the_seed_alone(models, pictures):
    words = [str(pictures), "--caption_weights", str(models / "blip"), "--recursive", "--top_p", "1", "--overwrite"]
    made = []
    for seed in ("1", "1", "2"):
        main([*words, "--seed", seed, "--max_length", "8", "--min_length", "8"])
        made.append(captions(pictures))
    assert made[0] == made[1] != made[2]
    (pictures / "a.caption").unlink()
    main([*words[:-1], "--seed", "2", "--max_length", "8", "--min_length", "8"])
    assert captions(pictures) == made[2]


def test_blip_goes_on_from_the_first_words_and_git_takes_none(models, pictures):
    words = [str(pictures), "--recursive", "--prompt", "a photo of", "--beam_search"]
    main([*words, "--caption_weights", str(models / "blip")])
    assert all(caption.startswith("a photo of") for caption in captions(pictures))
    with pytest.raises(UserError, match="--prompt: a model of the type git takes none"):
        main([*words, "--caption_weights", str(models / "git"), "--overwrite"])


def test_the_script_for_git_has_its_own_flags(models, pictures):
    make_captions_by_git([str(pictures), "--model_id", str(models / "git"), "--recursive", "--max_length", "3"])
    assert all(len(caption.split()) <= 3 for caption in captions(pictures))


def test_what_is_no_model_is_a_sentence(models, pictures, tmp_path):
    with pytest.raises(UserError, match=r"--caption_weights: there is no folder https?:.* nothing is downloaded here"):
        main([str(pictures), "--caption_weights", "https://example.com/model.pth"])
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}', encoding="utf-8")
    with pytest.raises(UserError, match="is no captioning model"):
        main([str(pictures), "--caption_weights", str(tmp_path)])
    (pictures / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"broken\.png \(the file is empty\)"):
        main([str(pictures), "--caption_weights", str(models / "blip"), "--recursive"])
    assert len(captions(pictures)) == 3
