"""A vision-language model asked about a picture: by its probability of yes, or in words behind an endpoint.

vqa_score        P(yes) / (P(yes) + P(no)) of the next token     VQAScore (Lin et al. 2024, arXiv:2404.01291)
vlm_score        a number in an answer                           as UnifiedReward (arXiv:2503.05236)
vlm_preference   which of two pictures is better                 as UnifiedReward, pairwise
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.contracts import Media
from mmalign.records import Outcome, Prompts, RewardSignal
from mmalign.rewardmodels.endpoint import Endpoint, Question, said, shown
from mmalign.rewardmodels.inputs import pictures, texts
from mmalign.rewardmodels.precisions import Precision, dtype_of


class YesNo:
    """A vision-language model of transformers: P(yes) / (P(yes) + P(no)) of the first token of its answer.

    Words count with and without a capital and a space before, in all their spellings that are one token.
    """

    def __init__(
        self,
        name: str,
        model: str,
        precision: Precision,
        yes: Sequence[str] = ("yes",),
        no: Sequence[str] = ("no",),
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = dtype_of(name, precision)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
            self._model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: model {model} does not load: {error}") from error
        self._model.eval().requires_grad_(False)
        self._processor.tokenizer.padding_side = "left"
        self._yes, self._no = (variants(self._processor.tokenizer, words) for words in (yes, no))
        for setting, tokens in (("yes", self._yes), ("no", self._no)):
            if not tokens:
                raise ValueError(f"{name}: the tokenizer of {model} has no token for {setting}")

    @torch.no_grad()
    def ask(self, images: Tensor, questions: Sequence[str], batch: int) -> Tensor:
        """How likely yes is for each picture [n, 3, H, W] and its question, [n] from 0 to 1."""
        self._model.to(images.device)
        rows = [slice(first, first + batch) for first in range(0, len(images), batch)]
        found: Tensor = torch.cat([self._part(images[part], questions[part]) for part in rows])
        return found

    def _part(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": picture_of(image)},
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for image, question in zip(images, questions, strict=True)
        ]
        inputs = self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(images.device)
        return yes_of(self._model(**inputs).logits[:, -1], self._yes, self._no)


def yes_of(logits: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """P(yes) / (P(yes) + P(no)) [n] of the next token's logits [n, V], each summed over its tokens."""
    log_p = logits.float().log_softmax(-1)
    one, other = (log_p[:, list(tokens)].logsumexp(1) for tokens in (yes, no))
    found: Tensor = (one - other).sigmoid()
    return found


@dataclass(eq=False)
class VqaScore:
    """How likely a vision-language model is to say yes to the picture showing its prompt, 0 to 1."""

    model: str  # any image-text-to-text model of transformers; local folder or hub id
    question: str = 'Does this picture show "{}"? Please answer yes or no.'  # {} is the prompt
    yes: tuple[str, ...] = ("yes",)  # words that count; with and without a capital and a space before
    no: tuple[str, ...] = ("no",)  # likewise
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 8  # pictures at once; lower it for less memory
    name = "vqa_score"

    def __post_init__(self) -> None:
        if "{}" not in self.question:
            raise ValueError(f"vqa_score: question must hold {{}} for the prompt, got {self.question!r}")
        if self.batch < 1:
            raise ValueError(f"vqa_score: batch must be at least 1, got {self.batch}")
        self._asked = YesNo(self.name, self.model, self.precision, self.yes, self.no)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        questions = [self.question.replace("{}", prompt) for prompt in texts(outcome)]
        values = self._asked.ask(pictures(self.name, outcome), questions, self.batch)
        return RewardSignal(self.name, values[:, None])


@dataclass(eq=False)
class ArtifactQuestion:
    """How likely a frozen vision-language model is to say no to there being artifacts, 0 to 1.

    After arXiv:2601.03468; the question is best searched for on labeled pictures: scripts/search_question.py.
    """

    model: str  # any image-text-to-text model of transformers; local folder or hub id
    # What is asked; yes means that there are artifacts.
    question: str = "Does this picture have artifacts or broken parts? Please answer yes or no."
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 8  # pictures at once; lower it for less memory
    name = "artifact_question"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"artifact_question: batch must be at least 1, got {self.batch}")
        self._asked = YesNo(self.name, self.model, self.precision)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome)
        values = 1 - self._asked.ask(images, [self.question] * len(images), self.batch)
        return RewardSignal(self.name, values[:, None])


def variants(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The single tokens that spell one of the words, with or without a capital and a space before it."""
    spelled = {form for word in words for form in (word, word.capitalize(), word.upper())}
    wanted = {prefix + form for form in spelled for prefix in ("", " ")}
    found = set()
    for text in wanted:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.add(int(ids[0]))
    return sorted(found)


def picture_of(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as the processors of language models take it."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(pixels.numpy())


RATE = (
    "Rate how well the picture shows what was asked for, and how good it looks, with a number from {low} to "
    "{high}. "
    'Asked for: "{prompt}". Say why in a sentence, then end with: Final score: NUMBER'
)
COMPARE = (
    'Two pictures, first and second, were made for: "{prompt}". Which shows it better and looks better? Say '
    "why in a sentence, then end with: Better: first, Better: second, or Better: tie"
)
_SCORE = re.compile(r"final score\W*(-?\d+(?:\.\d+)?)", re.I)
_BETTER = re.compile(r"better\W*(first|second|tie)\b(?!\s*(?:/|or\b))", re.I)
_THOUGHT = re.compile(r".*</think>|<think>.*", re.I | re.S)
# What UnifiedReward's judges are trained to end with, by the question that its authors publish. A sentence of
# its own or after a word of conclusion: neither "whether Image 1 is better" nor "Color: Image 1 is better".
_CONCLUDED = re.compile(
    r"(?:(?:in |the |my )?(?:final |overall )?(?:conclusion|answer|verdict|judge?ment|decision)(?: is)?"
    r"|therefore|thus|hence|so|overall)?[:,]?\s*"
    r"(image 1 is better|image 2 is better|both images are equally good)(?: overall)?",
    re.I,
)
_SHARE = {
    "first": 1.0,
    "image 1 is better": 1.0,
    "second": 0.0,
    "image 2 is better": 0.0,
    "tie": 0.5,
    "both images are equally good": 0.5,
}


def preferred(answer: str) -> float:
    """1 where an answer finds the first of two pictures better, 0 where the second, 1/2 for a tie.

    It is read after its thoughts (<think>): what the last "Better: ..." says, and "Image 1 is better.",
    "Image 2 is better." or "Both images are equally good.", as a sentence of its own or as the conclusion.
    NaN where none is there, or where they contradict each other.
    """
    text = _THOUGHT.sub("", answer).replace("*", "")
    words = list(_BETTER.finditer(text))
    line = text.rfind("\n", 0, words[-1].start()) if words else 0
    told = {_SHARE[word[1].lower()] for word in words if word.start() > line}
    for sentence in re.split(r"[.!;\n<>\"]", text):
        if concluded := _CONCLUDED.fullmatch(sentence.strip()):
            told.add(_SHARE[concluded[1].lower()])
    return told.pop() if len(told) == 1 else torch.nan


@dataclass
class VlmScore:
    """The number that a model behind an endpoint gives a picture, between `low` and `high`.

    An answer without a number in that range is no verdict. Settings of `Endpoint` go into `endpoint`.
    """

    url: str  # address of the endpoint, http://localhost:8000/v1
    model: str  # name that the endpoint knows the model by
    low: float = 1.0  # lowest number of the scale
    high: float = 5.0  # highest number of the scale
    template: str = RATE  # {prompt}, {low} and {high} are filled in
    endpoint: dict[str, Any] = field(default_factory=dict)  # settings of `Endpoint`: parallel, budgets, cache
    name = "vlm_score"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"vlm_score: low must lie below high, got {self.low} and {self.high}")
        self._client = Endpoint(self.url, self.model, **self.endpoint)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome, "cpu")
        asked = [
            self.template.format(prompt=prompt, low=f"{self.low:g}", high=f"{self.high:g}")
            for prompt in texts(outcome)
        ]
        questions = [
            Question([{"role": "user", "content": [shown(picture_of(image)), said(text)]}])
            for image, text in zip(images, asked, strict=True)
        ]
        values, details = [], []
        for answer in self._client.ask(questions):
            numbers = [float(number) for number in _SCORE.findall(answer.text or "")]
            value = numbers[-1] if numbers and self.low <= numbers[-1] <= self.high else torch.nan
            values.append(value)
            missing = answer.problem or "the answer holds no score in the range"
            details.append({"said": answer.text} if value == value else {"missing": missing})
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=list(details))


@dataclass
class VlmPreference:
    """Which of two pictures a model behind an endpoint finds better; asked in both orders by default.

    An answer that is ambiguous is no verdict; see `preferred` for what is read.
    """

    url: str  # address of the endpoint, http://localhost:8000/v1
    model: str  # name that the endpoint knows the model by
    both_orders: bool = True  # ask for each pair twice, either picture first
    template: str = COMPARE  # {prompt} is filled in
    endpoint: dict[str, Any] = field(default_factory=dict)  # settings of `Endpoint`: parallel, budgets, cache
    name = "vlm_preference"

    def __post_init__(self) -> None:
        self._client = Endpoint(self.url, self.model, **self.endpoint)

    def prefer(self, prompts: Prompts, first: Media, second: Media) -> Tensor:
        """1 where the first is better, 0 where the second, 1/2 for a tie, NaN without a verdict; [n]."""
        pairs = [pictures(self.name, Outcome(prompts, media), "cpu") for media in (first, second)]
        questions = [
            Question(
                [
                    {
                        "role": "user",
                        "content": [
                            shown(picture_of(one)),
                            shown(picture_of(other)),
                            said(self.template.format(prompt=prompt)),
                        ],
                    }
                ]
            )
            for one, other, prompt in zip(*pairs, prompts.text, strict=True)
        ]
        return torch.tensor([preferred(answer.text or "") for answer in self._client.ask(questions)])
