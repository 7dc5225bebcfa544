"""The language of the lab: prompts for tasks and back, captions for scenes."""

import re
from collections.abc import Container

from mmalign.lab.scenes import CANVAS, COLORS, LETTERS, RELATIONS, SHAPES, Relation, Scene, Thing
from mmalign.lab.tasks import PLACES, SAID_SIZES, Group, Spelling, Task

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}


def write_prompt(task: Task) -> str:
    """The short lower-case sentence that asks for a task."""
    if task.word:
        return f'the word "{task.word.text}"' + (f" in {task.word.color}" if task.word.color else "")
    phrases = [_phrase(group) for group in task.groups]
    if task.relations:
        return f"{phrases[0]} {task.relations[0].kind} {phrases[1]}"
    return listed(phrases)


def _phrase(group: Group) -> str:
    number = next(word for word, count in NUMBERS.items() if count == group.count)
    noun = group.shape if group.count == 1 else PLURALS[group.shape]
    return " ".join(filter(None, (number, group.size, group.color, noun, group.place)))


def listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def tokens(prompt: str) -> list[str]:
    """The prompt cut into words, commas, quotation marks and, between those, letters: see `vocabulary`."""
    found: list[str] = []
    for i, part in enumerate(prompt.split('"')):
        if i:
            found.append('"')
        found += list(part) if i % 2 else re.findall(r"[^\s,]+|,", part)
    return found


def vocabulary() -> list[str]:
    """Every token a prompt can contain, sorted."""
    words = {*NUMBERS, *SHAPES, *SINGULARS, *SAID_SIZES, *COLORS, "and", ",", '"', "the", "word", "in"}
    for phrase in (*RELATIONS, *PLACES):
        words |= set(phrase.split())
    return sorted(words | set(LETTERS))


def parse(prompt: str) -> Task:
    """The task a prompt asks for, the inverse of `write_prompt`; a ValueError names an unknown word."""
    spelled = re.fullmatch(r'the word "(\S+)"(?: in (\S+))?', prompt)
    if spelled:
        return Task(word=Spelling(*spelled.groups()))
    _Reader(prompt).check_words()
    for kind in RELATIONS:
        first, found, second = prompt.partition(f" {kind} ")
        if found:
            return Task((_Reader(first).group(), _Reader(second).group()), (Relation(0, kind, 1),))
    return Task(tuple(_Reader(phrase).group() for phrase in re.split(r", | and ", prompt)))


class _Reader:
    """Reads the words of one phrase from left to right."""

    def __init__(self, phrase: str) -> None:
        self.phrase = phrase
        self.words = tokens(phrase)

    def check_words(self) -> None:
        known = set(vocabulary()) - set(LETTERS) | {"a"}
        for word in self.words:
            if word not in known:
                raise ValueError(f"parse: {word!r} is not a word of the lab, in {self.phrase!r}")

    def take(self, known: Container[str]) -> str | None:
        """The next word if it is one of the known ones, else None and the word stays."""
        return self.words.pop(0) if self.words and self.words[0] in known else None

    def group(self) -> Group:
        number, size, color = self.take(NUMBERS), self.take(SAID_SIZES), self.take(COLORS)
        noun = self.take(SHAPES) if number == "a" else self.take(SINGULARS)
        place = " ".join(self.words) or None
        if number is None or noun is None or place not in (None, *PLACES):
            raise ValueError(f"parse: expected [number size color shape place], got {self.phrase!r}")
        return Group(SINGULARS.get(noun, noun), NUMBERS[number], color, size, place)


def write_caption(scene: Scene) -> str:
    """Everything a scene shows: every thing with size, color, shape and place, then every relation."""
    facts = []
    if scene.word is not None:
        word = scene.word
        facts.append(f'the word "{word.text}" in {word.color} {region(word.x, word.y)}')
    if scene.things:
        things = [f"a {described(thing)} {region(thing.x, thing.y)}" for thing in scene.things]
        facts.append(listed(things))
    for pair in scene.relations():
        first, second = scene.things[pair.first], scene.things[pair.second]
        facts.append(f"the {described(first)} is {pair.kind} the {described(second)}")
    return "; ".join(facts) or "nothing"


def described(thing: Thing) -> str:
    return f"{thing.size} {thing.color} {thing.shape}"


def region(x: float, y: float) -> str:
    """The ninth of the picture a place lies in."""
    row = ("top", "middle", "bottom")[min(int(3 * y / CANVAS), 2)]
    column = ("left", "center", "right")[min(int(3 * x / CANVAS), 2)]
    if (row, column) == ("middle", "center"):
        return "in the center"
    return f"at the {row} {column}".replace("middle ", "").replace(" center", "")
