"""Tiny random captioners of the real classes, written to disk as users have them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import transformers as T
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = (
    "a",
    "red",
    "blue",
    "dog",
    "cat",
    "hat",
    "on",
    "the",
    "left",
    ".",
    "describe",
    "picture",
    "two",
    "of",
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% elif part['type'] == 'video' %} <video> "
    "{% else %} {{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)
SIDE = 28


def tokenizer(special: Sequence[str] = ("<image>",), **names: Any) -> PreTrainedTokenizerFast:
    """A token for each word; texts are joined by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    every = ["<pad>", "<end>", "<unk>", *special, "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        **names,
    )


def tiny_llava(folder: Path) -> Path:
    """A LLaVA of 16 image tokens with random weights."""
    words = tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# Other families, each with the processor of its own; they differ in what stands for a picture.


def spoken(picture: str, video: str = "<video>") -> str:
    """A chat template in which these tokens stand for a picture and for a video."""
    return TEMPLATE.replace("<image>", picture).replace("<video>", video)


def language(words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        **more,
    }


def eyes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **more,
    }


def qwen(kind: str) -> tuple[Any, Any, Any]:
    """Flat patches with their grid, and places with a row and a column."""
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer(special)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, map(words.convert_tokens_to_ids, special), strict=True))
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        vision |= {"out_hidden_size": 32, "intermediate_size": 32}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        rope["mrope_interleaved"] = True
    text = language(words, rope_parameters=rope, **({"head_dim": 16} if kind == "Qwen3VL" else {}))
    config = getattr(T, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    videos = T.Qwen3VLVideoProcessor if kind == "Qwen3VL" else T.Qwen2VLVideoProcessor
    processor = getattr(T, f"{kind}Processor")(
        image_processor=T.Qwen2VLImageProcessor(min_pixels=16 * 16, max_pixels=48 * 48, **sizes),
        tokenizer=words,
        video_processor=videos(
            size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, cap_pixels_per_frame=False, **sizes
        ),
        chat_template=spoken(
            *(f"<|vision_start|> <|{what}_pad|> <|vision_end|>" for what in ("image", "video"))
        ),
    )
    return getattr(T, f"{kind}ForConditionalGeneration"), config, processor


def idefics(kind: str) -> tuple[Any, Any, Any]:
    """A list of crops for each picture."""
    rows = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    words = tokenizer(("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows))
    config = getattr(T, f"{kind}Config")(
        text_config=language(words, model_type="llama"),
        vision_config=eyes(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=words.pad_token_id,
    )
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    more = {}
    if kind == "SmolVLM":
        frames = {"fps": 1, "max_frames": 4}
        more["video_processor"] = T.SmolVLMVideoProcessor(video_sampling=frames, num_frames=4, fps=1, **size)
    processor = getattr(T, f"{kind}Processor")(
        image_processor=getattr(T, f"{kind}ImageProcessor")(do_image_splitting=True, **size),
        tokenizer=words,
        image_seq_len=4,
        chat_template=TEMPLATE,
        **more,
    )
    return getattr(T, f"{kind}ForConditionalGeneration"), config, processor


def paligemma(kind: str) -> tuple[Any, Any, Any]:
    """Picture and prompt see each other in both directions, and there is no chat template."""
    words = tokenizer(("<image>", "<bos>"), bos_token="<bos>")
    config = T.PaliGemmaConfig(
        text_config=language(words, model_type="gemma", head_dim=16),
        vision_config=eyes(model_type="siglip_vision_model", projection_dim=32, vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    images = T.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    return T.PaliGemmaForConditionalGeneration, config, T.PaliGemmaProcessor(images, words)


def gemma3(kind: str) -> tuple[Any, Any, Any]:
    """The tokens of a picture see each other in both directions."""
    image, begin, end = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    words = tokenizer(
        (image, begin, end, "<bos>"),
        bos_token="<bos>",
        extra_special_tokens={"image_token": image, "boi_token": begin, "eoi_token": end},
    )
    config = T.Gemma3Config(
        text_config=language(words, head_dim=16, sliding_window=64),
        vision_config=eyes(vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids(image),
        boi_token_index=words.convert_tokens_to_ids(begin),
        eoi_token_index=words.convert_tokens_to_ids(end),
        mm_tokens_per_image=4,
    )
    processor = T.Gemma3Processor(
        T.Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        words,
        image_seq_length=4,
        chat_template=spoken(begin),
    )
    return T.Gemma3ForConditionalGeneration, config, processor


def onevision(kind: str) -> tuple[Any, Any, Any]:
    """As many crops as the picture's own shape needs."""
    words, grid = tokenizer(("<image>", "<video>")), [[16, 16], [32, 32]]
    config = T.LlavaOnevisionConfig(
        text_config=language(words, model_type="qwen2"),
        vision_config=eyes(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    side = {"height": 16, "width": 16}
    processor = T.LlavaOnevisionProcessor(
        image_processor=T.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=grid),
        tokenizer=words,
        video_processor=T.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return T.LlavaOnevisionForConditionalGeneration, config, processor


def internvl(kind: str) -> tuple[Any, Any, Any]:
    """Crops whose places are shuffled into channels."""
    words = tokenizer(
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = T.InternVLConfig(
        text_config=language(words, model_type="qwen2"),
        vision_config=eyes(image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    side = {"height": 16, "width": 16}
    processor = T.InternVLProcessor(
        image_processor=T.GotOcr2ImageProcessor(
            size=side, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=words,
        video_processor=T.InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=spoken("<IMG_CONTEXT>"),
    )
    return T.InternVLForConditionalGeneration, config, processor


FAMILIES = {
    "Qwen2VL": qwen,
    "Qwen2_5_VL": qwen,
    "Qwen3VL": qwen,
    "SmolVLM": idefics,
    "Idefics3": idefics,
    "PaliGemma": paligemma,
    "Gemma3": gemma3,
    "LlavaOnevision": onevision,
    "InternVL": internvl,
}


# Families without a token for a picture.


def blip(kind: str) -> tuple[Any, Any, Any]:
    """A decoder that looks at the picture by cross-attention."""
    words = tokenizer(("<bos>",), bos_token="<bos>")
    text = T.BlipTextConfig(
        **{**language(words), "num_key_value_heads": None},
        encoder_hidden_size=32,
        sep_token_id=words.eos_token_id,
        max_position_embeddings=64,
    )
    vision = T.BlipVisionConfig(**eyes(initializer_range=0.2))
    config = T.BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    processor = T.BlipProcessor(T.BlipImageProcessor(size={"height": 16, "width": 16}), words)
    return T.BlipForConditionalGeneration, config, processor


def git(kind: str) -> tuple[Any, Any, Any]:
    """Features of the picture before the words of the decoder."""
    words = tokenizer(("<bos>",), bos_token="<bos>", cls_token="<bos>")
    sizes = {key: value for key, value in language(words).items() if key != "num_key_value_heads"}
    frames = 4 if kind == "GITVideo" else None
    config = T.GitConfig(
        vision_config=eyes(), max_position_embeddings=64, num_image_with_embedding=frames, **sizes
    )
    side = {"height": 16, "width": 16}
    images = T.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side)
    return T.GitForCausalLM, config, T.GitProcessor(images, words)


def florence(kind: str) -> tuple[Any, Any, Any]:
    """An encoder that reads picture and prompt, and a decoder that looks at what it read."""
    words = tokenizer(
        ("<image>", "<bos>"), bos_token="<bos>", extra_special_tokens={"image_token": "<image>"}
    )
    text = {
        "model_type": "bart",
        "vocab_size": len(words),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "init_std": 0.3,
        "max_position_embeddings": 64,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "decoder_start_token_id": words.eos_token_id,
        "forced_eos_token_id": None,
    }
    vision = T.Florence2VisionConfig(
        depths=(1, 1),
        patch_size=(7, 3),
        patch_stride=(4, 2),
        patch_padding=(3, 1),
        patch_prenorm=(False, True),
        embed_dim=(16, 32),
        num_heads=(2, 2),
        num_groups=(2, 2),
        window_size=2,
        drop_path_rate=0.0,
        projection_dim=32,
        initializer_range=0.2,
    )
    config = T.Florence2Config(
        text_config=text,
        vision_config=vision.to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    side = {"height": 32, "width": 32}
    images = T.CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    images.image_seq_length = 17  # 4 x 4 places and their mean
    return T.Florence2ForConditionalGeneration, config, T.Florence2Processor(images, words)


CROSS = {"BLIP": blip, "GIT": git, "Florence2": florence}


def tiny_captioner(name: str, folder: Path) -> Path:
    """A captioner of that family with random weights."""
    kind, config, processor = (FAMILIES | CROSS | {"GITVideo": git})[name](name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        for part, p in model.named_parameters():
            if "mm_input_projection" in part:  # of Gemma 3, which begins with zeros
                p.data.normal_(0, 0.2)
            if name == "BLIP" and p.ndim == 2 and ("transform" in part or "crossattention" in part):
                p.data.normal_(0, 0.5)  # else it says one word again and again, whatever it sees
    words = processor.tokenizer
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    if config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = config.text_config.decoder_start_token_id
        model.generation_config.forced_bos_token_id = words.bos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path, number: int = 4) -> list[str]:
    """Pictures of one color each, the last of them inside a zip."""
    folder.mkdir(exist_ok=True)
    files = []
    for i in range(number):
        picture = Image.new("RGB", (40, 30), tuple(80 * ((i >> k) & 1) + 40 * k for k in range(3)))
        if i < number - 1:
            picture.save(folder / f"{i}.png")
            files.append(str(folder / f"{i}.png"))
        else:
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            with zipfile.ZipFile(folder / "images.zip", "w") as archive:
                archive.writestr(f"inside/{i}.png", buffer.getvalue())
            files.append(str(folder / "images.zip" / "inside" / f"{i}.png"))
    return files


def clip(folder: Path, count: int = 10, tone: int = 0) -> list[str]:
    """Frames of one video, whose names need their numbers to be read as such; tone: of its blue."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"frame_{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.new("RGB", (32, 32), (25 * i, 255 - 25 * i, tone)).save(file)
    return [str(file) for file in files]
