"""Policies over diffusers and transformers models, found by the class that a model folder names."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from mmalign.contracts import PolicySettings
from mmalign.pipelines.captioner import CaptionAdapter, CaptionPolicy
from mmalign.pipelines.flow import DTYPES, FlowAdapter, FlowPolicy
from mmalign.records import Split
from mmalign.sde import Noise

# `_class_name` of model_index.json -> adapter
ADAPTERS = {
    "AuraFlowPipeline": "mmalign.pipelines.aura_flow:AuraFlow",
    "BriaFibo2Pipeline": "mmalign.pipelines.bria:Fibo2",
    "BriaFiboPipeline": "mmalign.pipelines.bria:Fibo",
    "BriaPipeline": "mmalign.pipelines.bria:Bria",
    "ChromaPipeline": "mmalign.pipelines.flux:Chroma",
    "CogVideoXImageToVideoPipeline": "mmalign.pipelines.cogvideo:CogVideoXImageToVideo",
    "CogVideoXPipeline": "mmalign.pipelines.cogvideo:CogVideoX",
    "CogView4Pipeline": "mmalign.pipelines.cogview4:CogView4",
    "DreamLiteMobilePipeline": "mmalign.pipelines.dreamlite:DreamLiteMobile",
    "DreamLitePipeline": "mmalign.pipelines.dreamlite:DreamLite",
    "FluxKontextPipeline": "mmalign.pipelines.flux:FluxKontext",
    "FluxPipeline": "mmalign.pipelines.flux:Flux",
    "HiDreamImagePipeline": "mmalign.pipelines.hidream:HiDream",
    "CogView3PlusPipeline": "mmalign.pipelines.cogview3:CogView3Plus",
    "ErnieImagePipeline": "mmalign.pipelines.ernie_image:ErnieImage",
    "HunyuanDiTPipeline": "mmalign.pipelines.hunyuan_dit:HunyuanDiT",
    "HunyuanImagePipeline": "mmalign.pipelines.hunyuan_image:HunyuanImage",
    "HunyuanVideo15ImageToVideoPipeline": "mmalign.pipelines.hunyuan_video:HunyuanVideo15ImageToVideo",
    "HunyuanVideo15Pipeline": "mmalign.pipelines.hunyuan_video:HunyuanVideo15",
    "HunyuanVideoImageToVideoPipeline": "mmalign.pipelines.hunyuan_video:HunyuanVideoImageToVideo",
    "HunyuanVideoPipeline": "mmalign.pipelines.hunyuan_video:HunyuanVideo",
    "Flux2KleinPipeline": "mmalign.pipelines.flux2:Flux2Klein",
    "Flux2Pipeline": "mmalign.pipelines.flux2:Flux2",
    "LDMTextToImagePipeline": "mmalign.pipelines.ldm:LatentDiffusion",
    "LTX2ImageToVideoPipeline": "mmalign.pipelines.ltx2:LTX2ImageToVideo",
    "LTX2Pipeline": "mmalign.pipelines.ltx2:LTX2",
    "LTXImageToVideoPipeline": "mmalign.pipelines.ltx:LTXImageToVideo",
    "LTXPipeline": "mmalign.pipelines.ltx:LTX",
    "Lumina2Pipeline": "mmalign.pipelines.lumina2:Lumina2",
    "Ideogram4Pipeline": "mmalign.pipelines.ideogram4:Ideogram4",
    "Kandinsky3Pipeline": "mmalign.pipelines.kandinsky3:Kandinsky3",
    "Kandinsky5T2IPipeline": "mmalign.pipelines.kandinsky5:Kandinsky5",
    "KolorsPipeline": "mmalign.pipelines.kolors:Kolors",
    "Krea2Pipeline": "mmalign.pipelines.krea2:Krea2",
    "LongCatImagePipeline": "mmalign.pipelines.ovis_image:LongCatImage",
    "LuminaPipeline": "mmalign.pipelines.lumina:LuminaNext",
    "NucleusMoEImagePipeline": "mmalign.pipelines.nucleus_image:NucleusImage",
    "OmniGenPipeline": "mmalign.pipelines.omnigen:OmniGen",
    "OvisImagePipeline": "mmalign.pipelines.ovis_image:OvisImage",
    "PRXPipeline": "mmalign.pipelines.prx:PRX",
    "PRXPixelPipeline": "mmalign.pipelines.prx:PRXPixel",
    "PixArtAlphaPipeline": "mmalign.pipelines.pixart:PixArtAlpha",
    "PixArtSigmaPipeline": "mmalign.pipelines.pixart:PixArtSigma",
    "QwenImage21Pipeline": "mmalign.pipelines.qwen_image21:QwenImage21",
    "QwenImageEditPipeline": "mmalign.pipelines.qwen_image:QwenImageEdit",
    "QwenImageEditPlusPipeline": "mmalign.pipelines.qwen_image:QwenImageEditPlus",
    "QwenImagePipeline": "mmalign.pipelines.qwen_image:QwenImage",
    "SanaPipeline": "mmalign.pipelines.sana:Sana",
    "WanImageToVideoPipeline": "mmalign.pipelines.wan:WanImageToVideo",
    "WanPipeline": "mmalign.pipelines.wan:Wan",
    "ZImageOmniPipeline": "mmalign.pipelines.z_image:ZImageOmni",
    "ZImagePipeline": "mmalign.pipelines.z_image:ZImage",
    "StableDiffusion3Pipeline": "mmalign.pipelines.sd3:SD3",
    "StableDiffusionPipeline": "mmalign.pipelines.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "mmalign.pipelines.sd:StableDiffusionXL",
}
# `model_type` of config.json -> adapter, for models that have no token for a picture
CAPTION_ADAPTERS = {
    "blip": "mmalign.pipelines.encoder_decoder:PictureEncoder",
    "florence2": "mmalign.pipelines.encoder_decoder:EncoderDecoder",
    "git": "mmalign.pipelines.encoder_decoder:PicturePrefix",
}
CAPTIONER = "captioner"  # what a folder in transformers format holds


def load(
    settings: PolicySettings,
    noise: Noise,
    device: torch.device | str = "cpu",
    *,
    split: Split = "whole",
    seed: int = 0,
) -> FlowPolicy | CaptionPolicy:
    """The policy over `settings.model`, a local folder or a hub id; errors name the setting and its mend.

    noise, split: of a flow model. seed: of fresh adapters.
    """
    if settings.precision not in DTYPES:
        raise ValueError(f"policy.precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}")
    kind = pipeline_class(settings.model)
    if Path(settings.model).expanduser().is_dir():
        hide_bars()
    if kind == CAPTIONER:
        return CaptionPolicy(caption_adapter(settings), settings, device, chunk=settings.chunk, seed=seed)
    if settings.rollout.url:
        raise ValueError("policy.rollout is of captioners, and policy.model draws pictures")
    module, _, name = ADAPTERS[kind].partition(":")
    family = getattr(importlib.import_module(module), name)
    try:
        adapter: FlowAdapter = family(settings)
        check_words(adapter.pipeline.components)
    except ImportError:
        raise  # it names what is to be installed
    except Exception as error:  # of files that were cut off libraries raise errors of any kind
        raise ValueError(f"policy.model: {settings.model} does not load as a pipeline: {error}") from error
    return FlowPolicy(adapter, settings, noise, device, split=split, chunk=settings.chunk, seed=seed)


def caption_adapter(settings: PolicySettings) -> CaptionAdapter:
    """The adapter over a model in transformers format."""
    from transformers import AutoConfig

    try:
        kind: str = AutoConfig.from_pretrained(settings.model).model_type
        module, _, name = CAPTION_ADAPTERS.get(kind, "mmalign.pipelines.vlm:VisionLanguage").partition(":")
        adapter: CaptionAdapter = getattr(importlib.import_module(module), name)(settings)
        check_words({"tokenizer": adapter.tokenizer})
        return adapter
    except ImportError:
        raise  # it names what is to be installed
    except Exception as error:  # of files that were cut off libraries raise errors of any kind
        raise ValueError(f"policy.model: {settings.model} does not load as a captioner: {error}") from error


def check_words(parts: Mapping[str, object]) -> None:
    """ValueError where a tokenizer among the parts of a model has no words.

    transformers makes one of its special tokens alone where the files are not there.
    """
    from transformers import PreTrainedTokenizerBase

    for name, part in parts.items():
        words = getattr(part, "tokenizer", part)  # a processor has one
        # T5's has a space as well.
        if isinstance(words, PreTrainedTokenizerBase) and len(words) <= len(set(words.all_special_ids)) + 1:
            raise ValueError(f"its {name} has no words; are its files there?")


def hide_bars() -> None:
    """No progress bars: a folder loads in seconds. Downloads keep theirs."""
    from diffusers.utils.logging import disable_progress_bar as hide_diffusers
    from transformers.utils.logging import disable_progress_bar as hide_transformers

    hide_diffusers()
    hide_transformers()


def pipeline_class(model: str) -> str:
    """The pipeline class that a model folder or hub id names, if there is an adapter; "captioner" for one."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
            return _captioner_in(folder)
        found = _named_in(folder)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        found = _named_on_hub(model)
    else:
        raise FileNotFoundError(
            f"policy.model: there is no folder {model}; name a folder in diffusers format, or a hub id such "
            "as stabilityai/stable-diffusion-3.5-medium"
        )
    if found not in ADAPTERS and found != CAPTIONER:
        known = ", ".join(sorted(ADAPTERS))
        raise ValueError(f"policy.model: {model} holds a {found}, and there are adapters for {known}")
    return str(found)


def _named_in(folder: Path) -> object:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"policy.model: {folder} is no pipeline and no captioner, it has no model_index.json and "
            "no config.json; name the folder that save_pretrained wrote"
        )
    try:
        return json.loads(index.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"policy.model: {index} cannot be read: {error}") from error


def _captioner_in(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"policy.model: {folder / 'config.json'} cannot be read: {error}") from error
    return _reads_pictures(str(folder), kind)


def _reads_pictures(model: str, kind: object) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    if kind not in NAMES:
        raise ValueError(
            f"policy.model: {model} holds a {kind}, which does not read pictures and write; name an "
            "image-text-to-text model of transformers, or a pipeline of diffusers"
        )
    return CAPTIONER


def _named_on_hub(model: str) -> object:
    from diffusers import DiffusionPipeline
    from transformers import AutoConfig

    try:
        return _reads_pictures(model, AutoConfig.from_pretrained(model).model_type)
    except (OSError, ValueError):
        pass  # no captioner: a pipeline has no configuration of its own at the top
    try:
        return DiffusionPipeline.load_config(model).get("_class_name")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"policy.model: there is no folder {model}, and the hub gives no such pipeline: {error}"
        ) from error
