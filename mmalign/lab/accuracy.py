"""How well the verifier reads pictures whose scenes are known, clean and spoiled.

`python -m mmalign.lab.accuracy` prints the table.
"""

import random
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mmalign.lab.reading import read_scene
from mmalign.lab.render import render
from mmalign.lab.scenes import Scene
from mmalign.lab.tasks import CATEGORIES, compose, sample_task

NEAR = 1.5  # pixels a thing may be off its place
SPOILED = ((0.0, 0.0), (0.05, 0.0), (0.1, 0.0), (0.0, 1.0), (0.0, 1.5), (0.05, 1.5), (0.1, 1.5))


@dataclass(frozen=True)
class Accuracy:
    """Share of `scenes` scenes read without any error, by the category of their task."""

    noise: float
    blur: float
    scenes: int
    by_category: dict[str, float]

    @property
    def overall(self) -> float:
        return float(np.mean(list(self.by_category.values())))


def accuracy_report(n: int, noise: float = 0.0, blur: float = 0.0, seed: int = 0) -> Accuracy:
    """Reads `n` scenes per category, half of each split, after blur (pixels) and then noise (of [0, 1])."""
    rng, draws = random.Random(f"accuracy {seed}"), np.random.default_rng(seed)
    shares = {}
    for category in CATEGORIES:
        right = 0
        for i in range(n):
            scene = compose(sample_task(rng, category, ("train", "heldout")[i % 2]), rng)
            right += same(scene, read_scene(spoil(render(scene), noise, blur, draws)))
        shares[category] = right / n
    return Accuracy(noise, blur, n * len(CATEGORIES), shares)


def spoil(picture: np.ndarray, noise: float, blur: float, draws: np.random.Generator) -> np.ndarray:
    """A uint8 picture [H, W, 3] as floats [3, H, W], blurred and with noise."""
    image: np.ndarray = ndimage.gaussian_filter(picture / 255, (blur, blur, 0))
    return (image + draws.normal(0, noise, image.shape)).clip(0, 1).transpose(2, 0, 1)


def same(drawn: Scene, read: Scene) -> bool:
    """Whether both hold the same word and the same things: shape, color, size and place."""
    words = [(scene.word.text, scene.word.color) if scene.word else None for scene in (drawn, read)]
    if words[0] != words[1] or len(drawn.things) != len(read.things):
        return False
    return all(
        any(
            (thing.shape, thing.color, thing.size) == (other.shape, other.color, other.size)
            and max(abs(thing.x - other.x), abs(thing.y - other.y)) < NEAR
            for other in read.things
        )
        for thing in drawn.things
    )


def table(reports: list[Accuracy]) -> str:
    """The reports as a Markdown table, in percent."""
    names = [category.replace("_", " ") for category in CATEGORIES]
    lines = ["| noise | blur | all | " + " | ".join(names) + " |", "|---:" * (len(names) + 3) + "|"]
    for report in reports:
        shares = [report.overall, *(report.by_category[category] for category in CATEGORIES)]
        lines.append(
            f"| {report.noise:g} | {report.blur:g} | " + " | ".join(f"{100 * s:.1f}" for s in shares) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([accuracy_report(200, noise, blur) for noise, blur in SPOILED]))
