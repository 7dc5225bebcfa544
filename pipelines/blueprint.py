"""Models without weights: their real classes on the meta device, built from configurations alone.

A configuration is that of a local folder, or of `models/*.json` for models of the hub that people train most.
The latter were written down from what is published of them and diffusers' own defaults; a test compares
their numbers of parameters with the published ones.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    """parts: name -> (library, class, configuration), a scheduler among them; settings: of the pipeline."""

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
    kind = getattr(importlib.import_module(library), name)
    if "Scheduler" in name:
        return kind.from_config(dict(config))
    with META:
        if library == "diffusers":
            return kind.from_config(dict(config)).eval()
        made: nn.Module = kind(kind.config_class.from_dict(dict(config)))
        return made.eval()


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
            if blueprint.parts[part][0] == "diffusers" or settings.precision == "fp16":
                _keep(network)
    return FlowPolicy(adapter, settings, noise, META, split=split, chunk=settings.chunk)


def _keep(network: nn.Module) -> None:
    """Bring what a model keeps in fp32 in half precision (embeddings of time, norms) to it."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()


def blank_text(policy: FlowPolicy) -> Condition:
    """What the network would see of one text, on the meta device; ValueError for families without a pattern.

    Lengths that the network reads as numbers stand on the CPU.
    """
    adapter, dtype = policy.adapter, DTYPES[policy.settings.precision]
    kind = type(adapter.pipeline).__name__
    if kind not in PATTERNS:
        raise ValueError(
            f"policy.model: there is no plan for a {kind} yet, only for {', '.join(sorted(PATTERNS))}"
        )
    length = policy.settings.max_sequence_length
    found = {
        name: shape if isinstance(shape, torch.Tensor) else torch.empty(shape, device=META, dtype=dtype)
        for name, shape in PATTERNS[kind](adapter, length).items()
    }
    if getattr(adapter, "needs_pictures", False):
        found["pictures"] = torch.empty(1, *policy.shape, device=META)
    return found


Pattern = Callable[[Any, int], dict[str, "tuple[int, ...] | torch.Tensor"]]


def _all(length: int, device: torch.device = META) -> torch.Tensor:
    return torch.ones(length, dtype=torch.bool, device=device)


def _clip_length(adapter: Any) -> int:
    encoder = adapter.pipeline.text_encoder
    return 77 if encoder is None else int(encoder.config.max_position_embeddings)


# Pipeline -> what its adapter encodes of a text of so many tokens.
PATTERNS: dict[str, Pattern] = {
    "StableDiffusion3Pipeline": lambda a, n: {
        "embeds": (_clip_length(a) + n, a.config.joint_attention_dim),
        "pooled": (a.config.pooled_projection_dim,),
    },
    "FluxPipeline": lambda a, n: {
        "embeds": (n, a.config.joint_attention_dim),
        "pooled": (a.config.pooled_projection_dim,),
    },
    "QwenImagePipeline": lambda a, n: {"embeds": (n, a.config.joint_attention_dim), "mask": _all(n)},
    "ZImagePipeline": lambda a, n: {
        "embeds": (n, a.config.cap_feat_dim),
        "mask": _all(n, torch.device("cpu")),
    },
    "WanPipeline": lambda a, n: {"embeds": (n, a.config.text_dim)},
    "HunyuanVideoPipeline": lambda a, n: {
        "embeds": (n, a.config.text_embed_dim),
        "pooled": (a.config.pooled_projection_dim,),
        "mask": (n,),
    },
    "StableDiffusionXLPipeline": lambda a, n: {
        "embeds": (_clip_length(a), a.config.cross_attention_dim),
        "pooled": (a.config.projection_class_embeddings_input_dim - 6 * a.config.addition_time_embed_dim,),
    },
    "StableDiffusionPipeline": lambda a, n: {"embeds": (_clip_length(a), a.config.cross_attention_dim)},
}
PATTERNS["FluxKontextPipeline"] = PATTERNS["FluxPipeline"]
