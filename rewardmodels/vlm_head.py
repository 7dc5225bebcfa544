"""Qwen2-VL models with a head that puts a number on what they have read: HPSv3 and VideoReward (VideoAlign).

    hidden = Qwen2-VL(picture or frames, instruction with reward tokens)
    score  = head(hidden at each reward token)

HPSv3 (Ma et al. 2025, arXiv:2508.03789): one token; the head gives mean and deviation of a preference, and
the mean is the reward. VideoReward (Liu et al. 2025, arXiv:2501.13918): a token each for visual quality,
motion quality and text alignment; each score is standardized by its published mean and deviation.

The published weights are read under their own names: those of transformers before its Qwen2-VL was renamed,
and of peft where adapters were not merged. The instruction that a model was trained on belongs to its weights
and comes with them, in a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.clip import read_state
from mmalign.rewardmodels.inputs import frames, pictures, texts
from mmalign.rewardmodels.precisions import Precision, dtype_of

PROMPT = "{text_prompt}"  # where the prompt stands in an instruction
VIDEO_SCORES = ("visual_quality", "motion_quality", "text_alignment")
VIDEO_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
VIDEO_MEANS, VIDEO_STDS = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
HEAD = "rm_head."


class HeadedVLM:
    """A Qwen2-VL with reward tokens and a head, in the name of a reward."""

    def __init__(
        self,
        name: str,
        model: str,
        weights: str,
        template: str,
        tokens: Sequence[str],
        precision: Precision,
        lora_alpha: float | None,
    ) -> None:
        from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

        dtype = dtype_of(name, precision)
        if not Path(template).is_file():
            raise ValueError(
                f"{name}: there is no template {template}; it holds the instruction that the weights were "
                f"trained on, with {PROMPT} for the prompt and {' '.join(tokens)}"
            )
        self.template = Path(template).read_text(encoding="utf-8")
        if lacking := [part for part in (PROMPT, *tokens) if self.template.count(part) != 1]:
            raise ValueError(f"{name}: the template {template} must hold {lacking[0]} once")
        state = plain_names(merged(name, read_state(name, Path(weights)), lora_alpha))
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
            self._network: Any = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: model {model} does not load: {error}") from error
        words = self._processor.tokenizer
        words.add_special_tokens({"additional_special_tokens": list(tokens)})
        words.padding_side = "right"
        self._tokens = words.convert_tokens_to_ids(list(tokens))
        rows = state["model.language_model.embed_tokens.weight"].shape[0]
        if rows != self._network.get_input_embeddings().weight.shape[0]:
            self._network.resize_token_embeddings(rows, mean_resizing=False)
        self._head = head_of(name, weights, {k: v for k, v in state.items() if k.startswith(HEAD)})
        rest = {key: value for key, value in state.items() if not key.startswith(HEAD)}
        missing, unknown = self._network.load_state_dict(rest, strict=False)
        if lost := [key for key in (*missing, *unknown) if not key.startswith("lm_head")]:
            raise ValueError(f"{name}: {weights} does not fit {model}: {', '.join(lost[:3])}")
        self._network.eval().requires_grad_(False)

    def size(self, height: int, width: int, pixels: int) -> tuple[int, int]:
        """Height and width of about so many pixels, in whole cells of the network."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        images = self._processor.image_processor
        found: tuple[int, int] = smart_resize(
            height, width, images.patch_size * images.merge_size, min_pixels=pixels, max_pixels=pixels
        )
        return found

    @torch.no_grad()
    def __call__(self, shown: Sequence[Mapping[str, Any]], prompts: Sequence[str], device: Any) -> Tensor:
        """What the head says at each reward token, [n, tokens, outputs].

        shown: for each a part of a message, {"type": "image" or "video", that name: pixels}.
        """
        self._network.to(device)
        asked = [
            [
                {
                    "role": "user",
                    "content": [dict(part), {"type": "text", "text": self.template.replace(PROMPT, prompt)}],
                }
            ]
            for part, prompt in zip(shown, prompts, strict=True)
        ]
        kind = shown[0]["type"]
        told = [self._processor.apply_chat_template(one, add_generation_prompt=True) for one in asked]
        media: dict[str, Any] = {f"{kind}s": [part[kind] for part in shown]}
        if kind == "video":  # frames are chosen already
            media |= {"do_sample_frames": False}
        inputs = self._processor(text=told, padding=True, return_tensors="pt", **media).to(device)
        hidden = self._network.model(**inputs).last_hidden_state
        ids = inputs["input_ids"]
        places = torch.stack([(ids == token).int().argmax(1) for token in self._tokens], 1)  # [n, tokens]
        if not all((ids == token).any(1).all() for token in self._tokens):
            raise ValueError("a reward token is missing from the question; is the tokenizer the model's own?")
        found: Tensor = self._head.to(device)(hidden[torch.arange(len(ids))[:, None], places].float())
        return found


@dataclass(eq=False)
class HPSv3:
    """What people preferred, of a picture and its prompt, about 0 to 15: the mean of HPSv3's head."""

    weights: str  # HPSv3.safetensors, as published
    template: str  # file with the instruction that it was trained on
    model: str = "Qwen/Qwen2-VL-7B-Instruct"  # what its weights belong to; local folder or hub id
    token: str = "<|Reward|>"  # of the template, at which the head reads
    pixels: int = 256 * 28 * 28  # that every picture is brought to
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 8  # pictures at once; lower it for less memory
    name = "hpsv3"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.pixels < 1:
            raise ValueError(f"hpsv3: batch and pixels must be at least 1, got {self.batch}, {self.pixels}")
        self._judge = HeadedVLM(
            self.name, self.model, self.weights, self.template, (self.token,), self.precision, None
        )

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome)
        height, width = images.shape[-2:]
        size = self._judge.size(height, width, self.pixels)
        images = nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        shown: list[Mapping[str, Any]] = [
            {"type": "image", "image": as_bytes(image)} for image in images.cpu()
        ]
        return RewardSignal(self.name, self._ask(shown, texts(outcome), images.device)[:, None])

    def _ask(self, shown: Sequence[Mapping[str, Any]], prompts: Sequence[str], device: Any) -> Tensor:
        rows = range(0, len(shown), self.batch)
        parts = [self._judge(shown[i : i + self.batch], prompts[i : i + self.batch], device) for i in rows]
        return torch.cat(parts)[:, 0, 0]


@dataclass(eq=False)
class VideoAlign:
    """VideoReward's visual quality, motion quality and text alignment of a video, standardized, or their sum.

    grain criterion: the three apart.
    """

    weights: str  # model.pth, as published
    template: str  # file with the instruction that it was trained on
    model: str = "Qwen/Qwen2-VL-2B-Instruct"  # what its weights belong to; local folder or hub id
    lora_alpha: float | None = None  # of the adapters in the weights, where they are not merged
    frames: int = 10  # of a video that are shown, evenly over its length, at most; an even number
    grain: Literal["sample", "criterion"] = "sample"  # the sum of the three scores, or each by itself
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 4  # videos at once; lower it for less memory
    name = "videoalign"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.frames < 2 or self.frames % 2:
            raise ValueError(
                f"videoalign: batch must be at least 1 and frames even, got {self.batch}, {self.frames}"
            )
        if self.grain not in (known := get_args(Literal["sample", "criterion"])):
            raise ValueError(f"videoalign: grain must be one of {', '.join(known)}, got {self.grain!r}")
        self._judge = HeadedVLM(
            *(self.name, self.model, self.weights, self.template, VIDEO_TOKENS),
            self.precision,
            self.lora_alpha,
        )

    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        length = videos.shape[1]
        picked = torch.linspace(0, length - 1, min(self.frames, length)).round().long()
        if len(picked) % 2:  # two frames make one patch in time
            picked = torch.cat([picked, picked[-1:]])
        shown: list[Mapping[str, Any]] = [
            {"type": "video", "video": [*as_bytes(video[picked].cpu())]} for video in videos
        ]
        prompts = texts(outcome)
        rows = range(0, len(shown), self.batch)
        parts = [
            self._judge(shown[i : i + self.batch], prompts[i : i + self.batch], videos.device) for i in rows
        ]
        raw = torch.cat(parts)[..., 0]
        values = (raw - raw.new_tensor(VIDEO_MEANS)) / raw.new_tensor(VIDEO_STDS)
        details: list[Mapping[str, object]] = [
            dict(zip(VIDEO_SCORES, row, strict=True)) for row in values.tolist()
        ]
        if self.grain == "criterion":
            return RewardSignal(self.name, values, Unit.CRITERION, details=details)
        return RewardSignal(self.name, values.sum(1, keepdim=True), details=details)


def as_bytes(images: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def head_of(name: str, file: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The linear layers of a head with a ReLU between every two, in the order of their names."""
    layers: list[nn.Module] = []
    for key in sorted((key for key in state if key.endswith("weight")), key=place_of):
        high, low = state[key].shape
        bias = state.get(key.removesuffix("weight") + "bias")
        layer = nn.Linear(low, high, bias=bias is not None)
        layer.load_state_dict({"weight": state[key]} | ({} if bias is None else {"bias": bias}))
        layers += [layer] if not layers else [nn.ReLU(), layer]
    if not layers:
        raise ValueError(f"{name}: {file} holds no rm_head, so it judges nothing")
    return nn.Sequential(*layers).float().eval().requires_grad_(False)


def place_of(key: str) -> int:
    """rm_head.3.weight -> 3; 0 where there is one layer."""
    return next((int(part) for part in key.split(".") if part.isdecimal()), 0)


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that Qwen2-VL has in transformers today."""
    found = {}
    for key, value in state.items():
        name = re.sub(r"^visual\.", "model.visual.", key.removeprefix("base_model.model."))
        found[re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)] = value
    return found


def merged(name: str, state: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    """Weights with their adapters added: W + alpha / rank B A (arXiv:2106.09685)."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        plain = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if ".original_module." in key:
            continue
        stem = key.partition(".base_layer.")[0]
        low, high = (state.get(f"{stem}.lora_{side}.default.weight") for side in "AB")
        if ".base_layer.weight" in key and low is not None and high is not None:
            if alpha is None:
                raise ValueError(f"{name}: the weights hold adapters; give their lora_alpha")
            value = value.float() + alpha / low.shape[0] * high.float() @ low.float()
        found[plain] = value
    return found
