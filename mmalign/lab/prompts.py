"""The lists of prompts for training and evaluation: no duplicates, nothing held out in training.

The lists in the repository were written by `python -m mmalign.lab.prompts assets/lab/prompts`.
"""

import json
import random
import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from mmalign.lab.clips import list_clip_prompts
from mmalign.lab.grammar import parse, write_prompt
from mmalign.lab.tasks import CATEGORIES, MIX, sample_task

# Who teaches what, where a student is distilled from two teachers.
TEACHERS = {
    "things": ("single_object", "counting", "colors", "text"),
    "scenes": ("two_objects", "position", "attribute_binding"),
}
TRAIN, HELD_OUT, VALIDATION = 2000, 105, 105
VIDEO_TRAIN, VIDEO_HELD_OUT = 800, 100
PATIENCE = 400  # draws without a new prompt after which a category is taken to be exhausted


def list_prompts(
    count: int, split: str, shares: Mapping[str, float], seed: int = 0, without: Container[str] = ()
) -> list[str]:
    """`count` different prompts of a split in random order, the categories in proportion to `shares`.

    A category with too few prompts gives all it has, and the others fill up: there are 18 single objects.
    `without`: prompts that must not be among them.
    """
    rng = random.Random(f"prompts {split} {seed}")
    found: dict[str, dict[str, None]] = {category: {} for category in shares}
    open_ = list(shares)
    while (total := sum(map(len, found.values()))) < count:
        if not open_:
            raise ValueError(
                f"list_prompts: the {split} split has only {total} prompts, {count} were asked for"
            )
        # The category furthest behind its share is next.
        category = min(open_, key=lambda name: (len(found[name]) + 1) / shares[name])
        known = found[category]
        fresh = (write_prompt(sample_task(rng, category, split)) for _ in range(PATIENCE))
        prompt = next((prompt for prompt in fresh if prompt not in known and prompt not in without), None)
        if prompt is None:
            open_.remove(category)
        else:
            known[prompt] = None
    prompts = [prompt for category in shares for prompt in found[category]]
    rng.shuffle(prompts)
    return prompts


def train_prompts(count: int = TRAIN) -> list[str]:
    """Training prompts, mixed like the training pictures."""
    return list_prompts(count, "train", MIX)


def held_out_prompts(count: int = HELD_OUT) -> list[str]:
    """Held-out prompts, as many of every category as there are or as the others have."""
    return list_prompts(count, "heldout", dict.fromkeys(CATEGORIES, 1.0))


def validation_prompts(count: int = VALIDATION) -> list[str]:
    """Prompts of the training split that are not trained on: to choose settings by, so that nothing is chosen
    by the held-out ones. As many of every category as there are or as the others have."""
    shares = dict.fromkeys(CATEGORIES, 1.0)
    return list_prompts(count, "train", shares, seed=1, without=frozenset(train_prompts()))


def teacher_of(prompt: str) -> str:
    """Who teaches a prompt of the lab."""
    category = parse(prompt).category
    return next(name for name, categories in TEACHERS.items() if category in categories)


def write_lists(folder: Path) -> None:
    """Writes train.txt, validation.txt and heldout.txt, a prompt on each line; `parse` recovers its task.

    Those of clips begin with video_. Also the training prompts with their teachers (train_taught.jsonl), and
    the held-out ones that are each teacher's (heldout_things.txt).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train": train_prompts(), "validation": validation_prompts(), "heldout": held_out_prompts()}
    for name, prompts in lists.items():
        write_lines(folder / f"{name}.txt", prompts)
    # Clips: what trains, what settings are chosen by, what is held out.
    known = list_clip_prompts(VIDEO_TRAIN + VIDEO_HELD_OUT, "train")
    write_lines(folder / "video_train.txt", known[:VIDEO_TRAIN])
    write_lines(folder / "video_validation.txt", known[VIDEO_TRAIN:])
    write_lines(folder / "video_heldout.txt", list_clip_prompts(VIDEO_HELD_OUT, "heldout"))
    for teacher in TEACHERS:
        own = [prompt for prompt in lists["heldout"] if teacher_of(prompt) == teacher]
        write_lines(folder / f"heldout_{teacher}.txt", own)
    taught = (json.dumps({"prompt": p, "teacher": teacher_of(p)}) for p in lists["train"])
    write_lines(folder / "train_taught.jsonl", taught)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    write_lists(Path(sys.argv[1]))
