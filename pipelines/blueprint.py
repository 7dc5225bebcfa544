"""Models without weights: their real classes on the meta device, built from configurations alone.

A configuration is that of a local folder, or of `models/*.json` for models of the hub that people train most.
The latter were written down from what is published of them and diffusers' own defaults; a test compares
their numbers of parameters with the published ones.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mmalign.contracts import PolicySettings
from mmalign.pipelines import ADAPTERS
from mmalign.pipelines.flow import DTYPES, Condition, FlowPolicy
from mmalign.records import Split
from mmalign.sde import Noise

SHIPPED = Path(__file__).parent / "models"
META = torch.device("meta")
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class Blueprint:
    """parts: name -> (library, class, configuration), a scheduler among them; settings: of the pipeline.

    A processor, which has no weights, has its folder for a configuration.
    """

    pipeline: str
    parts: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    settings: Mapping[str, Any]


def known_models() -> dict[str, Path]:
    """The hub ids whose configurations are shipped, and their files."""
    return {
        name: file for file in sorted(SHIPPED.glob("*.json")) for name in json.loads(file.read_text())["ids"]
    }


def read_blueprint(model: str) -> Blueprint:
    """The blueprint of a local folder in diffusers format or of a shipped hub id; ValueError for others."""
    folder = Path(model).expanduser()
    if (folder / "model_index.json").is_file():
        return _of_folder(folder)
    shipped = known_models()
    if model not in shipped:
        raise ValueError(
            f"policy.model: nothing is known of {model} without its weights; name a local folder in "
            f"diffusers format, or one of {', '.join(sorted(shipped))}"
        )
    told = json.loads(shipped[model].read_text())
    parts = {name: (part["library"], part["class"], part["config"]) for name, part in told["parts"].items()}
    return Blueprint(told["pipeline"], parts, told["settings"])


def _of_folder(folder: Path) -> Blueprint:
    index = json.loads((folder / "model_index.json").read_text())
    parts, settings = {}, {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list):
            settings[name] = entry
            continue
        library, kind = entry
        if name == "processor" and (folder / name).is_dir():
            parts[name] = (library, kind, {"folder": str(folder / name)})
            continue
        files = [folder / name / file for file in ("config.json", "scheduler_config.json")]
        file = next((file for file in files if file.is_file()), None)
        if kind is not None and file is not None:
            parts[name] = (library, kind, json.loads(file.read_text()))
    return Blueprint(index["_class_name"], parts, settings)


def build(blueprint: Blueprint) -> Any:
    """The diffusers pipeline with its networks on the meta device, and without tokenizers."""
    kind = getattr(importlib.import_module("diffusers"), blueprint.pipeline)
    made = {name: _part(*part) for name, part in blueprint.parts.items()}
    wanted = inspect.signature(kind.__init__).parameters
    rest = {
        name: None
        for name, parameter in wanted.items()
        if name not in ("self", *made, *blueprint.settings) and parameter.default is inspect.Parameter.empty
    }
    return kind(**made, **rest, **{k: v for k, v in blueprint.settings.items() if k in wanted})


def _part(library: str, name: str, config: Mapping[str, Any]) -> Any:
    kind = getattr(_library(library), name)
    if "Processor" in name:
        return kind.from_pretrained(config["folder"])
    if "Scheduler" in name:
        return kind.from_config(dict(config))
    with META:
        if not hasattr(kind, "config_class"):  # of diffusers
            return kind.from_config(dict(config)).eval()
        made: nn.Module = kind(kind.config_class.from_dict(dict(config)))
        return made.eval()


def _library(name: str) -> Any:
    """The package, or the folder of diffusers' own that classes of one family alone are kept in."""
    from diffusers import pipelines

    return importlib.import_module(f"diffusers.pipelines.{name}" if hasattr(pipelines, name) else name)


def blank_policy(settings: PolicySettings, noise: Noise, split: Split = "whole") -> FlowPolicy:
    """The policy over a model of which there are no weights; its forwards give shapes alone."""
    blueprint = read_blueprint(settings.model)
    if blueprint.pipeline not in ADAPTERS:
        raise ValueError(f"policy.model: {settings.model} holds a {blueprint.pipeline}, which has no adapter")
    module, _, name = ADAPTERS[blueprint.pipeline].partition(":")
    pipeline = build(blueprint)
    adapter = getattr(importlib.import_module(module), name)(settings, pipeline)
    frozen = DTYPES[settings.precision]
    for part, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            whole = part == getattr(adapter, "autoencoder", "vae") or (
                part in DENOISERS and not settings.lora.rank
            )
            nn.Module.to(network, torch.float32 if whole else frozen)
            # Models of transformers keep theirs (of T5 a fifth) in fp32 in fp16 alone.
            if blueprint.parts[part][0] != "transformers" or settings.precision == "fp16":
                _keep(network)
    return FlowPolicy(adapter, settings, noise, META, split=split, chunk=settings.chunk)


def _keep(network: nn.Module) -> None:
    """Bring what a model keeps in fp32 in half precision (embeddings of time, norms) to it."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()


def blank_text(policy: FlowPolicy, pictures: int = 0) -> Condition:
    """What the network would see of one text, on the meta device; ValueError for families without a pattern.

    pictures: how many stand beside the text; at least one does where the family needs some. Lengths that the
    network reads as numbers stand on the CPU.
    """
    adapter, dtype = policy.adapter, DTYPES[policy.settings.precision]
    kind = type(adapter.pipeline).__name__
    if kind not in PATTERNS:
        raise ValueError(
            f"policy.model: there is no plan for a {kind} yet, only for {', '.join(sorted(PATTERNS))}"
        )
    count = max(pictures, int(getattr(adapter, "needs_pictures", False)))
    found = PATTERNS[kind](adapter, policy.settings.max_sequence_length, count)
    return {
        name: shape if isinstance(shape, torch.Tensor) else torch.empty(shape, device=META, dtype=dtype)
        for name, shape in found.items()
    }


Seen = dict[str, "tuple[int, ...] | torch.Tensor"]
Pattern = Callable[[Any, int, int], Seen]
CPU = torch.device("cpu")


def _all(length: int, dtype: torch.dtype = torch.bool, device: torch.device = META) -> torch.Tensor:
    return torch.ones(length, dtype=dtype, device=device)


def _clip_length(adapter: Any) -> int:
    encoder = adapter.pipeline.text_encoder
    return 77 if encoder is None else int(encoder.config.max_position_embeddings)


def _latent(adapter: Any) -> tuple[int, ...]:
    """[C, *place] of what the policy draws."""
    settings = adapter.settings
    return tuple(adapter.latent_shape(settings.height, settings.width))


def _pictures(adapter: Any, count: int) -> Seen:
    """Latents of pictures that stand beside the one that is drawn."""
    return {"pictures": torch.empty(count, *_latent(adapter), device=META)} if count else {}


def _first(adapter: Any, frames: int | None = 1, more: int = 0) -> Seen:
    """The latent of a video's first picture; frames: None for all of the video; more: further channels."""
    channels, all_frames, *place = _latent(adapter)
    return {"first": torch.empty(channels + more, frames or all_frames, *place, device=META)}


def _flux(a: Any, n: int, k: int) -> Seen:
    return {"embeds": (n, a.config.joint_attention_dim), "pooled": (a.config.pooled_projection_dim,)}


def _flux2(a: Any, n: int, k: int) -> Seen:
    places = torch.empty(n, 4, dtype=torch.int64, device=META)
    return {"embeds": (n, a.config.joint_attention_dim), "text_places": places, **_pictures(a, k)}


class Supposing(TorchFunctionMode):
    """Answers what networks ask of tensors on the meta device that have no content.

    share: of the places of a mask that something is taken from or put at, those that are True; the others
    where it was inverted. answer: to every question of yes or no. Numbers that a network writes down stay on
    the CPU, where it reads them again.
    """

    def __init__(self, share: float, answer: bool) -> None:
        super().__init__()
        self.share, self.answer = share, answer
        self._inverted = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.tensor and torch.device(given.get("device") or CPU) == META:
            return func(*args, **given | {"device": CPU})
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return self.answer
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _blank_mask(args[1]):
            return func(args[0], self._places(args[1]), *args[2:])
        found = func(*args, **given)
        if func is torch.Tensor.__invert__ and _blank_mask(args[0]):
            self._inverted[found] = True
        return found

    def _places(self, mask: torch.Tensor) -> torch.Tensor:
        some = round(len(mask) * self.share)
        count = len(mask) - some if mask in self._inverted else some
        return torch.empty(count, dtype=torch.int64, device=META)


def _blank_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.is_meta and index.dtype == torch.bool


READING = ("HiDreamImagePipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15Pipeline")


def supposing(policy: FlowPolicy) -> AbstractContextManager[object]:
    """What to run a policy without weights under, forwards and what checkpointing computes again.

    Of pipelines whose network reads what its tensors hold: tokens are shared out evenly among the experts of
    a mixture, and texts fill their length. HunyuanVideo 1.5 asks whether it is without a picture.
    """
    adapter = policy.adapter
    if type(adapter.pipeline).__name__ not in READING:
        return nullcontext()
    share = 1 / adapter.config.get("num_routed_experts", 1)
    return Supposing(share, answer=not getattr(adapter, "needs_pictures", False))


class _Counting:
    """In the place of a text encoder: its states have the tokens of the text, and no content."""

    dtype = torch.float32

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])


def _qwen_edit(a: Any, n: int, k: int) -> Seen:
    """Tokens of the template and the pictures stand beside the text's; the processor counts them."""
    if a.pipeline.processor is None:
        raise ValueError(
            f"policy.model: {a.settings.model} holds no processor, by which tokens of pictures are counted; "
            "put its folder 'processor' beside the configurations"
        )
    sides = [side * a.scale for side in _latent(a)[1:]]
    plain = copy.copy(a.pipeline)
    vars(plain)["text_encoder"] = _Counting()
    shown = [a.shown(torch.zeros(3, *sides)) for _ in range(k)]
    around, _ = plain.encode_prompt([""], image=shown, device=CPU)
    length = around.shape[1] + n
    return {"embeds": (length, a.config.joint_attention_dim), "mask": _all(length), **_pictures(a, k)}


def _wan(a: Any, n: int, k: int) -> Seen:
    return {"embeds": (n, a.config.text_dim)}


def _wan_image(a: Any, n: int, k: int) -> Seen:
    if a.pipeline.config.expand_timesteps:
        return {**_wan(a, n, k), **_first(a)}
    seen = {**_wan(a, n, k), **_first(a, None, a.temporal)}
    if a.config.image_dim is not None:
        seen["shown"] = (_patches(a.pipeline.image_encoder.config) + 1, a.config.image_dim)
    return seen


def _patches(vision: Any) -> int:
    """How many an encoder of pictures cuts its picture into."""
    return int((vision.image_size // vision.patch_size) ** 2)


def _hunyuan(a: Any, n: int, k: int) -> Seen:
    return {"embeds": (n, a.config.text_embed_dim), "pooled": (a.config.pooled_projection_dim,), "mask": (n,)}


def _hunyuan_image(a: Any, n: int, k: int) -> Seen:
    """The text, less the four tokens that its template ends with, and every second token of the picture."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as plain

    tokens = int(plain.DEFAULT_PROMPT_TEMPLATE["image_emb_len"])
    return {**_hunyuan(a, n - 4 + (tokens + 1) // 2, k), **_first(a)}


def _captioned(a: Any, n: int, k: int) -> Seen:
    return {"embeds": (n, a.config.caption_channels), "mask": _all(n, torch.int64)}


def _ltx(a: Any, n: int, k: int) -> Seen:
    return {"embeds": (n, a.config.caption_channels), "mask": _all(n)}


def _ltx2(a: Any, n: int, k: int) -> Seen:
    config = a.pipeline.connectors.config
    video, audio = (
        config[f"{stream}_connector_num_attention_heads"] * config[f"{stream}_connector_attention_head_dim"]
        for stream in ("video", "audio")
    )
    return {"embeds": (n, video), "heard": (n, audio), "mask": _all(n, torch.int64)}


def _hidream(a: Any, n: int, k: int) -> Seen:
    """Every layer of Llama is told; the network takes those it was made for."""
    t5, llama = a.config.caption_channels
    layers = a.pipeline.text_encoder_4.config.num_hidden_layers
    return {"t5": (n, t5), "llama": (layers, n, llama), "pooled": (a.config.text_emb_dim,)}


def _hunyuan15(a: Any, n: int, k: int) -> Seen:
    """The pipeline's own lengths: of the text, and of what stands in quotes in it, letter by letter."""
    texts, letters = a.pipeline.tokenizer_max_length, a.pipeline.tokenizer_2_max_length
    return {
        "embeds": (texts, a.config.text_embed_dim),
        "mask": (texts,),
        "glyphs": (letters, a.config.text_embed_2_dim),
        "glyph_mask": (letters,),
    }


def _hunyuan15_image(a: Any, n: int, k: int) -> Seen:
    features = (_patches(a.pipeline.image_encoder.config), a.config.image_embed_dim)
    return {**_hunyuan15(a, n, k), **_first(a), "features": features}


def _cogview4(a: Any, n: int, k: int) -> Seen:
    longest = -(-n // 16) * 16  # texts are filled up in units of 16 tokens
    return {"embeds": (longest, a.config.text_embed_dim), "mask": _all(longest, device=CPU)}


# Pipeline -> what its adapter encodes of a text of n tokens beside k pictures: shapes of what has the
# precision of the policy, tensors of all else.
PATTERNS: dict[str, Pattern] = {
    "AuraFlowPipeline": lambda a, n, k: {"embeds": (n, a.config.joint_attention_dim)},
    "ChromaPipeline": lambda a, n, k: {"embeds": (n, a.config.joint_attention_dim), "mask": (n,)},
    "CogVideoXPipeline": lambda a, n, k: {"embeds": (n, a.config.text_embed_dim)},
    "CogVideoXImageToVideoPipeline": lambda a, n, k: {
        "embeds": (n, a.config.text_embed_dim),
        **_first(a, None),
    },
    "CogView4Pipeline": _cogview4,
    "Flux2KleinPipeline": _flux2,
    "Flux2Pipeline": _flux2,
    "FluxKontextPipeline": lambda a, n, k: {**_flux(a, n, k), **_pictures(a, k)},
    "FluxPipeline": _flux,
    "HiDreamImagePipeline": _hidream,
    "HunyuanVideo15ImageToVideoPipeline": _hunyuan15_image,
    "HunyuanVideo15Pipeline": _hunyuan15,
    "HunyuanVideoImageToVideoPipeline": _hunyuan_image,
    "HunyuanVideoPipeline": _hunyuan,
    "LTX2ImageToVideoPipeline": lambda a, n, k: {**_ltx2(a, n, k), **_first(a)},
    "LTX2Pipeline": _ltx2,
    "LTXImageToVideoPipeline": lambda a, n, k: {**_ltx(a, n, k), **_first(a)},
    "LTXPipeline": _ltx,
    "Lumina2Pipeline": lambda a, n, k: {
        "embeds": (n, a.config.cap_feat_dim),
        "mask": _all(n, torch.int64, CPU),
    },
    "PixArtAlphaPipeline": _captioned,
    "PixArtSigmaPipeline": _captioned,
    "QwenImageEditPipeline": _qwen_edit,
    "QwenImageEditPlusPipeline": _qwen_edit,
    "QwenImagePipeline": lambda a, n, k: {"embeds": (n, a.config.joint_attention_dim), "mask": _all(n)},
    "SanaPipeline": _captioned,
    "StableDiffusion3Pipeline": lambda a, n, k: _flux(a, _clip_length(a) + n, k),
    "StableDiffusionPipeline": lambda a, n, k: {"embeds": (_clip_length(a), a.config.cross_attention_dim)},
    "StableDiffusionXLPipeline": lambda a, n, k: {
        "embeds": (_clip_length(a), a.config.cross_attention_dim),
        "pooled": (a.config.projection_class_embeddings_input_dim - 6 * a.config.addition_time_embed_dim,),
    },
    "WanImageToVideoPipeline": _wan_image,
    "WanPipeline": _wan,
    "ZImagePipeline": lambda a, n, k: {"embeds": (n, a.config.cap_feat_dim), "mask": _all(n, device=CPU)},
}
