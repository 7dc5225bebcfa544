"""Policies over diffusers and transformers models, found by the class that a model folder names."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import torch

from mmalign.contracts import PolicySettings
from mmalign.pipelines.flow import DTYPES, FlowAdapter, FlowPolicy
from mmalign.sde import Noise

# `_class_name` of model_index.json -> adapter
ADAPTERS = {
    "StableDiffusion3Pipeline": "mmalign.pipelines.sd3:SD3",
    "StableDiffusionPipeline": "mmalign.pipelines.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "mmalign.pipelines.sd:StableDiffusionXL",
}


def load(
    settings: PolicySettings,
    noise: Noise,
    device: torch.device | str = "cpu",
    *,
    by_site: bool = False,
    chunk: int = 64,
    seed: int = 0,
) -> FlowPolicy:
    """The policy over `settings.model`, a local folder or a hub id; errors name the setting and its mend.

    by_site, chunk, seed: see `FlowPolicy`.
    """
    if settings.precision not in DTYPES:
        raise ValueError(f"policy.precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}")
    module, _, name = ADAPTERS[pipeline_class(settings.model)].partition(":")
    if Path(settings.model).expanduser().is_dir():
        hide_bars()
    family = getattr(importlib.import_module(module), name)
    try:
        adapter: FlowAdapter = family(settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"policy.model: {settings.model} does not load as a pipeline: {error}") from error
    return FlowPolicy(adapter, settings, noise, device, by_site=by_site, chunk=chunk, seed=seed)


def hide_bars() -> None:
    """No progress bars: a folder loads in seconds. Downloads keep theirs."""
    from diffusers.utils.logging import disable_progress_bar as hide_diffusers
    from transformers.utils.logging import disable_progress_bar as hide_transformers

    hide_diffusers()
    hide_transformers()


def pipeline_class(model: str) -> str:
    """The pipeline class that a model folder or hub id names, if there is an adapter for it."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        found = _named_in(folder)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        found = _named_on_hub(model)
    else:
        raise FileNotFoundError(
            f"policy.model: there is no folder {model}; name a folder in diffusers format, or a hub id such "
            "as stabilityai/stable-diffusion-3.5-medium"
        )
    if found not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise ValueError(f"policy.model: {model} holds a {found}, and there are adapters for {known}")
    return str(found)


def _named_in(folder: Path) -> object:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"policy.model: {folder} is no pipeline, it has no model_index.json; name the folder that "
            "pipeline.save_pretrained wrote"
        )
    try:
        return json.loads(index.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"policy.model: {index} cannot be read: {error}") from error


def _named_on_hub(model: str) -> object:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(model).get("_class_name")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"policy.model: there is no folder {model}, and the hub gives no such pipeline: {error}"
        ) from error
