"""A small 2-D world whose truth is known: scenes, tasks, prompts, pictures, and an exact verifier of them.

It is to this toolkit what a cart and a pole are to control: every method runs in minutes on a laptop.
"""

import random

import numpy as np

from mmalign.lab.grammar import parse, tokens, vocabulary, write_caption, write_prompt
from mmalign.lab.render import render
from mmalign.lab.scenes import Relation, Scene, Thing, Word
from mmalign.lab.tasks import CATEGORIES, Group, Spelling, Task, compose, sample_task

__all__ = [
    "CATEGORIES",
    "Group",
    "Relation",
    "Scene",
    "Spelling",
    "Task",
    "Thing",
    "Word",
    "compose",
    "parse",
    "render",
    "sample_task",
    "tokens",
    "training_pair",
    "vocabulary",
    "write_caption",
    "write_prompt",
]


def training_pair(rng: random.Random, split: str = "train") -> tuple[np.ndarray, str]:
    """A picture uint8 [64, 64, 3] and the prompt it satisfies, categories mixed as in `tasks.MIX`."""
    task = sample_task(rng, split=split)
    return render(compose(task, rng)), write_prompt(task)
