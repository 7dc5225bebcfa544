"""Does a picture show what its prompt asks for? Checked claim by claim, in the manner of GenEval.

GenEval (Ghosh et al. 2023, arXiv:2310.11513) trusts a detector; here the scene is read off the picture, and
"correct" also means that nothing else is there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.lab.reading import read_scene
from mmalign.lab.scenes import Scene, Thing, relation
from mmalign.lab.tasks import Group, Spelling, Task, placed

__all__ = ["Check", "Verdict", "judge", "read_scene", "score"]


@dataclass(frozen=True)
class Check:
    """One claim of the prompt, how far it holds in [0, 1], and the things of the scene it was judged on."""

    claim: str
    value: float
    things: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What was seen, held against what was asked; a task has the same checks, in order, for any picture."""

    category: str
    checks: tuple[Check, ...]
    asked: int  # things, or letters, the task asks for
    extras: int  # things, or letters, beyond those
    scene: Scene

    @property
    def strict(self) -> bool:
        """Everything asked for is there, and nothing else."""
        return self.extras == 0 and all(check.value == 1 for check in self.checks)

    @property
    def purity(self) -> float:
        """1 without extras; squared, so that drawing one more thing in case it is right does not pay."""
        return (self.asked / (self.asked + self.extras)) ** 2

    @property
    def soft(self) -> float:
        """The mean of the checks times the purity, in [0, 1]; 0 for a blank picture."""
        return float(np.mean([check.value for check in self.checks])) * self.purity


def score(image: Any, task: Task) -> Verdict:
    """The verdict on a picture; see `reading.as_picture` for what a picture may be."""
    return judge(read_scene(image), task)


def judge(scene: Scene, task: Task) -> Verdict:
    """The verdict on a scene that was already read."""
    if task.word:
        return judge_word(scene, task.word)
    asked = sum(group.count for group in task.groups)
    verdicts = [
        Verdict(task.category, checks, asked, extras(scene, task), scene)
        for checks in (tuple(check(scene, task, chosen)) for chosen in assignments(scene, task))
    ]
    return max(verdicts, key=lambda verdict: verdict.soft)


def extras(scene: Scene, task: Task) -> int:
    """Things and letters beyond the number asked for.

    A wrong thing in the place of a right one is left to the checks, and so is a surplus of what is counted.
    """
    counted = [group for group in task.groups if is_counted(group, task)]
    surplus = sum(max(seen(scene, group) - group.count, 0) for group in counted)
    asked = sum(group.count for group in task.groups)
    letters = len(scene.word.text) if scene.word else 0
    return max(len(scene.things) - asked - surplus, 0) + letters


def is_counted(group: Group, task: Task) -> bool:
    """Whether the number of things of the group's shape is a claim of the prompt."""
    return group.count > 1 and sum(other.shape == group.shape for other in task.groups) == 1


def seen(scene: Scene, group: Group) -> int:
    return sum(thing.shape == group.shape for thing in scene.things)


def assignments(scene: Scene, task: Task) -> Iterator[list[list[int]]]:
    """Ways to say which things are meant by each group; only things of its shape can be.

    Things are assigned for the most attributes right. Where a relation is asked for every pair is tried.
    """
    candidates = [
        [i for i, thing in enumerate(scene.things) if thing.shape == group.shape] for group in task.groups
    ]
    if task.relations and all(candidates):
        found = [[[i], [j]] for i, j in product(*candidates) if i != j]
        if found:
            yield from found
            return
    slots = [g for g, group in enumerate(task.groups) for _ in range(group.count)]
    gain = np.zeros((len(slots), len(scene.things)))
    for row, g in enumerate(slots):
        for i in candidates[g]:
            gain[row, i] = 1 + sum(attributes(task.groups[g], scene.things[i]).values())
    chosen: list[list[int]] = [[] for _ in task.groups]
    for row, i in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
        if gain[row, i] > 0:
            chosen[slots[row]].append(int(i))
    yield chosen


def attributes(group: Group, thing: Thing) -> dict[str, bool]:
    """For every attribute the group asks for, whether a thing of its shape has it."""
    found = {}
    if group.color:
        found[group.color] = thing.color == group.color
    if group.size:
        found[group.size] = thing.size == group.size
    if group.place:
        found[group.place] = placed(thing, group.place)
    return found


def check(scene: Scene, task: Task, chosen: Sequence[Sequence[int]]) -> Iterator[Check]:
    """The claims of a task about things, given which things each group means."""
    for group, mine in zip(task.groups, chosen, strict=True):
        found = seen(scene, group) if is_counted(group, task) else len(mine)
        number = max(0.0, 1 - abs(found - group.count) / group.count)
        yield Check(f"{group.count} {group.shape}", number, tuple(mine))
        # Too many of them lower the attributes as well: flooding a picture with red things earns nothing.
        share = (number if found > group.count else 1.0) / group.count
        for name in filter(None, (group.color, group.size, group.place)):
            right = sum(attributes(group, scene.things[i])[name] for i in mine)
            yield Check(f"{group.shape} {name}", right * share, tuple(mine))
    for link in task.relations:
        first, second = chosen[link.first], chosen[link.second]
        value = 0.0
        if first and second and relation(scene.things[first[0]], scene.things[second[0]]) == link.kind:
            value = likeness(task.groups[link.first], scene.things[first[0]])
            value *= likeness(task.groups[link.second], scene.things[second[0]])
        yield Check(link.kind, value, (*first, *second))


def likeness(group: Group, thing: Thing) -> float:
    """Share of what is asked that a thing of the right shape has right: a relation counts that much."""
    right = attributes(group, thing)
    return (1 + sum(right.values())) / (1 + len(right))


def judge_word(scene: Scene, asked: Spelling) -> Verdict:
    """The verdict on a task that asks for a word; its color counts as far as the spelling is right."""
    seen = scene.word.text if scene.word else ""
    spelling = max(0.0, 1 - edit_distance(seen, asked.text) / len(asked.text))
    checks = [Check(f'"{asked.text}"', spelling)]
    if asked.color:
        checks.append(Check(asked.color, spelling if scene.word and scene.word.color == asked.color else 0.0))
    return Verdict("text", tuple(checks), len(asked.text), len(scene.things), scene)


def edit_distance(seen: str, asked: str) -> int:
    """Least number of letters to insert, delete or replace."""
    row = list(range(len(asked) + 1))
    for i, letter in enumerate(seen, start=1):
        previous, row = row, [i]
        for j, other in enumerate(asked, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != other)))
    return row[-1]
