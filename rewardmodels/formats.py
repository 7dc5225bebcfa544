"""Networks in the formats of open_clip and timm, as models of transformers: neither library is needed.

open_clip   a folder with open_clip_config.json and open_clip_model.safetensors: CLIPs of two transformers
timm        a folder with config.json and model.safetensors: plain vision transformers (vit_...)

Each is the same arithmetic under other names. What has no counterpart is refused, by its name; other networks
of timm's run by timm itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPEN_CLIP, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TIMM, TIMM_WEIGHTS = "config.json", "model.safetensors"
VISION = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
TEXT = {"context_length", "vocab_size", "hf_tokenizer_name", "width", "layers", "heads", "mlp_ratio"}
PLAIN = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}


def is_open_clip(model: str) -> bool:
    return (Path(model) / OPEN_CLIP).is_file()


def is_timm(model: str) -> bool:
    file = Path(model) / TIMM
    return file.is_file() and "architecture" in json.loads(file.read_text())


def read_open_clip(model: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A CLIPModel and its image processor, from a folder of open_clip's."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    said = json.loads((Path(model) / OPEN_CLIP).read_text())
    config, prepare = said["model_cfg"], said.get("preprocess_cfg", {})
    vision, text = config["vision_cfg"], config["text_cfg"]
    _known(model, vision, VISION)
    _known(model, text, TEXT)
    _known(model, config, {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"})
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    sides = {
        side: {
            "hidden_size": part["width"],
            "num_hidden_layers": part["layers"],
            "num_attention_heads": heads,
            "intermediate_size": int(part["width"] * part.get("mlp_ratio", 4)),
            "hidden_act": act,
        }
        for side, part, heads in (
            ("vision", vision, vision["width"] // vision.get("head_width", 64)),
            ("text", text, text["heads"]),
        )
    }
    seen = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    last = text["vocab_size"] - 1  # the end of a text is the highest id, where open_clip pools
    read = {"vocab_size": last + 1, "max_position_embeddings": text["context_length"], "eos_token_id": last}
    built = CLIPConfig(
        text_config={**sides["text"], **read},
        vision_config={**sides["vision"], **seen},
        projection_dim=config["embed_dim"],
    )
    weights = _weights(Path(model) / OPEN_CLIP_WEIGHTS)
    network = _filled(CLIPModel, built, {k: v for key, x in weights.items() for k, v in clip_names(key, x)})
    size = vision["image_size"]
    squash = prepare.get("resize_mode", "shortest") == "squash"
    processor = CLIPImageProcessor(
        size={"height": size, "width": size} if squash else {"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_center_crop=not squash,
        resample=2 if prepare.get("interpolation") == "bilinear" else 3,
        **({"image_mean": prepare["mean"], "image_std": prepare["std"]} if "mean" in prepare else {}),
    )
    return network.to(dtype), processor


def read_timm(model: str) -> tuple[Any, list[float], list[float]]:
    """A ViTModel with the mean and the deviation of its pixels, from a folder of timm's."""
    from transformers import ViTConfig, ViTModel

    said = json.loads((Path(model) / TIMM).read_text())
    shape, prepared = said.get("model_args", {}), said.get("pretrained_cfg", {})
    _known(model, shape, PLAIN)
    config = ViTConfig(
        image_size=shape["img_size"],
        patch_size=shape["patch_size"],
        hidden_size=shape["embed_dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=int(shape["embed_dim"] * shape.get("mlp_ratio", 4)),
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    weights = {k: v for k, v in _weights(Path(model) / TIMM_WEIGHTS).items() if not k.startswith("head.")}
    renamed = {k: v for key, x in weights.items() for k, v in _vit_names(key, x)}
    network = _filled(ViTModel, config, renamed, add_pooling_layer=False)
    return network, prepared.get("mean", [0.5] * 3), prepared.get("std", [0.5] * 3)


def is_plain(model: str) -> bool:
    """Whether a folder of timm's holds a vision transformer that tells its shape: timm is not needed."""
    said = json.loads((Path(model) / TIMM).read_text())
    shape = said.get("model_args") or {}
    return said["architecture"].startswith("vit_") and {"img_size", "embed_dim", "depth"} <= shape.keys()


def read_by_timm(model: str) -> tuple[Any, list[float], list[float], int]:
    """Any network of timm's, run by it behind the interface of transformers; mean, deviation and side.

    ValueError where timm is not installed.
    """
    from transformers import AutoConfig, TimmWrapperModel

    config = AutoConfig.from_pretrained(model)
    # What the wrapper sets by itself, and does not take twice.
    kept = {k: v for k, v in (config.model_args or {}).items() if k not in ("num_classes", "global_pool")}
    config.model_args = {k: v for k, v in kept.items() if k != "in_chans"}
    prepared = config.pretrained_cfg or {}
    try:
        network = TimmWrapperModel.from_pretrained(model, config=config, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"{model} is a network of timm's: pip install timm ({error})") from error
    side = prepared.get("input_size", [3, 224, 224])[-1]
    if isinstance(given := kept.get("img_size", side), list | tuple):
        given = given[0]
    return network, prepared.get("mean", [0.5] * 3), prepared.get("std", [0.5] * 3), int(given)


def _known(model: str, said: Mapping[str, Any], known: set[str]) -> None:
    if strange := sorted(said.keys() - known):
        raise ValueError(f"{model}: {', '.join(strange)} cannot be read; install it in transformers' format")


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not file.is_file():
        raise ValueError(f"{file.parent}: has no {file.name}")
    return {key: value.float() for key, value in load_file(file).items()}


def _filled(kind: Any, config: Any, weights: Mapping[str, Tensor], **settings: Any) -> Any:
    """The model with these weights, each of which has its place."""
    with torch.random.fork_rng(devices=[]):
        network = kind(config, **settings)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _split(into: str, kind: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    for name, part in zip("qkv", value.chunk(3), strict=True):
        yield into.format(name) + kind, part


def clip_names(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The parameter of CLIPModel, or three, that one of open_clip's becomes."""
    if key == "logit_scale":
        yield key, value
    elif key in ("visual.proj", "text_projection"):
        yield f"{'visual' if key[0] == 'v' else 'text'}_projection.weight", value.T.contiguous()
    elif found := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", key):
        side, layer, name = found.groups()
        head = f"{'vision' if side else 'text'}_model.encoder.layers.{layer}."
        if name.startswith("attn.in_proj_"):
            yield from _split(head + "self_attn.{}_proj.", name.removeprefix("attn.in_proj_"), value)
            return
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            name = re.sub(rf"^{re.escape(old)}\.", f"{new}.", name)
        yield head + name, value
    else:
        yield CLIP_NAMES.get(key, key), value


CLIP_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def _vit_names(key: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The parameter of ViTModel, or three, that one of timm's becomes."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.*)", key)
    if found is None:
        head = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
        name = re.sub(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection.", head.get(key, key))
        yield re.sub(r"^norm\.", "layernorm.", name), value
        return
    layer, name = found.groups()
    if name.startswith("attn.qkv."):
        yield from _split(f"layers.{layer}.attention.{{}}_proj.", name.removeprefix("attn.qkv."), value)
        return
    for old, new in (
        ("attn.proj", "attention.o_proj"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
    ):
        name = re.sub(rf"^{re.escape(old)}\.", f"{new}.", name)
    yield f"layers.{layer}.{name}", value
