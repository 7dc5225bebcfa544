"""A vision-language model of transformers that answers questions on this machine, for judges.

It takes the same questions as `Endpoint` and gives the same answers, so that a judge does not know which of
the two it asks. Answers at a temperature of 0 are greedy; others are drawn from a stream of their own, named
by the question, so that a run that is resumed draws them again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmalign.rewardmodels.endpoint import Answer, Question
from mmalign.rewardmodels.precisions import Precision, dtype_of

BASE64 = ";base64,"


@dataclass(eq=False)
class LocalChat:
    """Any image-text-to-text model of transformers with a chat template."""

    model: str  # local folder or hub id
    precision: Precision = "fp32"  # bf16 or fp16 on accelerators
    longest: int = 1024  # tokens of an answer, at most
    batch: int = 8  # questions at once; lower it for less memory
    device: str | None = None  # where it runs; null: the accelerator, if there is one

    def __post_init__(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = dtype_of("judge", self.precision)
        for name in ("longest", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge: {name} must be at least 1, got {getattr(self, name)}")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(self.model)
            self._network: Any = AutoModelForImageTextToText.from_pretrained(self.model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"judge: model {self.model} does not load: {error}") from error
        if self._processor.chat_template is None:
            raise ValueError(
                f"judge: model {self.model} has no chat template, so it was not made to be asked; name one "
                "that was tuned to follow instructions"
            )
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._network.to(self.device or found).eval().requires_grad_(False)
        self._processor.tokenizer.padding_side = "left"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer for each question, in their order; the schema of a question is not enforced."""
        found: dict[int, Answer] = {}
        greedy = [i for i, question in enumerate(questions) if not question.temperature]
        groups = [greedy[first : first + self.batch] for first in range(0, len(greedy), self.batch)]
        groups += [[i] for i, question in enumerate(questions) if question.temperature]
        for group in groups:
            asked = [questions[i] for i in group]
            found |= dict(zip(group, self._answers(asked), strict=True))
        return [found[i] for i in range(len(questions))]

    @torch.no_grad()
    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Of questions with one temperature."""
        try:
            inputs = self._processor.apply_chat_template(
                [[turn(message) for message in question.messages] for question in questions],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            ).to(self._network.device)
        except (OSError, ValueError) as error:
            return [Answer(None, f"the question cannot be put: {error}")] * len(questions)
        heat = questions[0].temperature
        sampling = {"temperature": heat, "top_k": 0, "top_p": 1.0} if heat else {}
        devices = [self._network.device] if self._network.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed_of(questions[0]))
            tokens = self._network.generate(
                **inputs, max_new_tokens=self.longest, do_sample=heat > 0, **sampling
            )
        written = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        pad = self._processor.tokenizer.pad_token_id
        asked = inputs["attention_mask"].sum(1).tolist()
        told = (written != pad).sum(1).tolist()
        return [Answer(text, "", 1, a + b) for text, a, b in zip(texts, asked, told, strict=True)]


def turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the OpenAI format as chat templates of transformers take it, its pictures read."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message["role"], "content": [part_of(part) for part in parts]}


def part_of(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    data = part["image_url"]["url"].partition(BASE64)[2]
    return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")}


def seed_of(question: Question) -> int:
    """A number that the same question has every time."""
    name = json.dumps([list(question.messages), question.temperature, question.attempt], sort_keys=True)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
