"""Readers: they answer questions about a picture from its caption alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from mmalign.rewardmodels.precisions import DTYPES
from mmalign.rewardmodels.questions import LETTERS, ask

UNKNOWN = "This cannot be told from the description."  # the choice of a reader that finds no answer
LAB = "lab"
INSTRUCTION = "Below is a description of a picture that you cannot see. Rely on nothing but the description."


@dataclass(frozen=True)
class Asked:
    """A question about a picture, to be answered from its caption by one of the choices."""

    caption: str
    question: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """An answer that a reader may find likely after a caption, or a text about the picture (no question)."""

    caption: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


class Reader(Protocol):
    """Knows a caption and no picture; its weights stay as they are."""

    def choose(self, asked: Sequence[Asked]) -> list[int | None]:
        """The place of the choice that answers each question; None where there is no verdict."""
        ...

    def likelihood(self, told: Sequence[Told]) -> list[Tensor]:
        """log p of each token of each answer, [L] each."""
        ...


def load_reader(name: str, batch: int, precision: str) -> Reader:
    """The lab's reader (`lab`), or a causal language model of transformers by its folder or hub id."""
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    if name == LAB:
        lab: Reader = import_module("mmalign.rewardmodels.lab_reader").LabReader()
        return lab
    return LanguageReader(name, batch, precision)


class LanguageReader:
    """A causal language model. It chooses the likeliest letter, so that its answers are not drawn.

    Half a billion parameters were found too few to tell good captions from bad ones (CapRL); 3B serve.
    """

    def __init__(self, model: str, batch: int = 16, precision: str = "bf16") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._batch = batch
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[precision])
        self._model = found.to(device or "cpu").eval().requires_grad_(False)
        self._letters = [self._tokens(letter, special=False)[-1] for letter in LETTERS]

    def choose(self, asked: Sequence[Asked]) -> list[int | None]:
        prompts = [
            self._tokens(self.prompt(one.caption, ask(one.question, one.choices) + "\nAnswer by one letter."))
            for one in asked
        ]
        found: list[int | None] = [None] * len(asked)
        for rows, logits in self._forward(prompts, [1] * len(prompts)):
            for row, last in zip(rows, logits[:, -1], strict=True):
                found[row] = int(last[self._letters[: len(asked[row].choices)]].argmax())
        return found

    def likelihood(self, told: Sequence[Told]) -> list[Tensor]:
        """The answer begins where the prompt ends: both are cut into tokens by themselves."""
        prompts = [
            self._tokens(self.prompt(one.caption, one.question or "Describe the picture.")) for one in told
        ]
        answers = [self._tokens(one.answer, special=False) for one in told]
        found = [torch.zeros(0)] * len(told)
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        for rows, logits in self._forward(whole, [len(answer) + 1 for answer in answers]):
            for row, scores in zip(rows, logits, strict=True):
                answer = torch.tensor(answers[row], dtype=torch.int64, device=scores.device)
                log_p = scores[len(scores) - 1 - len(answer) : -1].log_softmax(-1)
                found[row] = log_p.gather(-1, answer[:, None])[:, 0].cpu()
        return found

    def prompt(self, caption: str, question: str) -> str:
        """What the model reads before it answers, in its own template where it has one."""
        said = f"{INSTRUCTION}\n\nDescription: {caption}\n\n{question}"
        if self._tokenizer.chat_template is None:
            return f"{said}\nAnswer: "
        turns = [{"role": "user", "content": said}]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def _tokens(self, text: str, special: bool | None = None) -> list[int]:
        """Ids of a text; a chat template brings its special tokens itself."""
        if special is None:
            special = self._tokenizer.chat_template is None
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    @torch.no_grad()
    def _forward(
        self, sequences: Sequence[list[int]], last: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Which sequences, and their logits [n, L, V] in fp32 at the end, L at least `last` of each.

        Sequences of like length share a batch and are padded on the left.
        """
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            length = len(sequences[rows[-1]])
            ids = torch.tensor([[0] * (length - len(sequences[row])) + sequences[row] for row in rows])
            size = torch.tensor([len(sequences[row]) for row in rows])
            mask = (torch.arange(length) >= length - size[:, None]).long()
            ids, mask = ids.to(self._model.device), mask.to(self._model.device)
            found = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=max(last[row] for row in rows),
                use_cache=False,
            )
            yield rows, found.logits.float()
