"""Write the prompt files of assets/prompts/: python scripts/make_prompts.py

Every text is put together here from word lists of our own, by a fixed seed; none is taken from a benchmark.
A line is {"prompt", "category", ...}; what else it holds (count, objects, relation, text) is for verifiers.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "prompts"
Row = dict[str, Any]

# Things that a COCO detector knows are marked by their plural; the others are for judges that read.
THINGS = {
    "apple": "apples", "banana": "bananas", "orange": "oranges", "carrot": "carrots", "pizza": "pizzas",
    "donut": "donuts", "cake": "cakes", "cup": "cups", "bowl": "bowls", "bottle": "bottles",
    "fork": "forks", "spoon": "spoons", "knife": "knives", "chair": "chairs", "couch": "couches",
    "bed": "beds", "clock": "clocks", "vase": "vases", "book": "books", "laptop": "laptops",
    "keyboard": "keyboards", "backpack": "backpacks", "umbrella": "umbrellas", "suitcase": "suitcases",
    "bicycle": "bicycles", "car": "cars", "bus": "buses", "train": "trains", "boat": "boats",
    "truck": "trucks", "bench": "benches", "kite": "kites", "cat": "cats", "dog": "dogs", "horse": "horses",
    "sheep": "sheep", "cow": "cows", "elephant": "elephants", "bear": "bears", "zebra": "zebras",
    "giraffe": "giraffes", "bird": "birds",
}  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
PLACES = (
    "on a wooden table", "in a grassy field", "on a sandy beach", "in front of a brick wall",
    "in a bright room", "on a cobbled street", "under a clear sky", "on a white background",
)  # fmt: skip
SIDES = {
    "to the left of": "left", "to the right of": "right", "above": "above", "below": "below",
    "in front of": "front", "behind": "behind", "on top of": "above", "next to": "beside",
}  # fmt: skip
WORDS = (
    "OPEN", "CLOSED", "BAKERY", "LIBRARY", "EXIT", "SALE", "HELLO", "WELCOME", "FRESH BREAD", "SLOW DOWN",
    "PLATFORM 9", "GOOD MORNING", "NO PARKING", "THANK YOU", "COFFEE", "HAPPY BIRTHDAY", "ROOM 204",
    "MUSEUM", "WET PAINT", "TICKETS", "LOST AND FOUND", "TAKE A SEAT", "MIND THE STEP", "FLOWERS",
    "JAZZ TONIGHT", "REPAIR SHOP", "SOUP OF THE DAY", "BOOKS", "HARBOR", "MADE WITH CARE",
)  # fmt: skip
SIGNS = (
    "a wooden sign that says", "a neon sign in a window that reads", "a chalkboard with the words",
    "a street sign that reads", "a mug with the text", "a paper poster with the title",
)  # fmt: skip
STYLES = {
    "watercolor": "a loose watercolor of {}", "oil": "an oil painting of {} with thick strokes",
    "pixel": "pixel art of {}", "pencil": "a pencil sketch of {}",
    "woodcut": "a black and white woodcut of {}", "paper": "a layered paper cut-out of {}",
    "clay": "a clay model of {}", "stained_glass": "{} in stained glass",
    "photo": "a sharp studio photograph of {}", "isometric": "an isometric drawing of {}",
}  # fmt: skip
MOTIFS = (
    "a lighthouse in a storm", "a quiet harbor at dawn", "an old tram on a hill", "a fox in fresh snow",
    "a bowl of lemons", "a windmill and tulips", "a mountain lake with a red canoe", "a cactus in a pot",
    "a stack of books and a lamp", "a sleeping cat on a windowsill", "a market stall with pumpkins",
    "a steam train on a bridge",
)  # fmt: skip
SCENES = {
    "kitchen": (
        "a kitchen counter with {}",
        (
            "flour, eggs and a rolling pin",
            "a kettle and two cups",
            "sliced bread and jam",
            "a cutting board with onions",
            "drying herbs over the sink",
            "a pan of pancakes",
        ),
    ),
    "street": (
        "a narrow street with {}",
        (
            "parked bicycles after rain",
            "a yellow tram and wet rails",
            "shop awnings at noon",
            "a row of potted plants",
            "string lights at dusk",
            "a delivery van and crates",
        ),
    ),
    "garden": (
        "a garden with {}",
        (
            "a hose, a bucket and tomatoes",
            "a stone path and lavender",
            "a birdbath under a pear tree",
            "rows of lettuce in morning light",
            "a rusty gate and roses",
            "a greenhouse with open windows",
        ),
    ),
    "desk": (
        "a desk with {}",
        (
            "an open notebook and a fountain pen",
            "two screens and a tangle of cables",
            "a globe and a pile of maps",
            "watercolors and a jar of brushes",
            "a repaired radio and screws",
            "a cold cup of tea and papers",
        ),
    ),
    "nature": (
        "a landscape with {}",
        (
            "a river bend and birch trees",
            "terraced fields in fog",
            "dunes and a single shrub",
            "a frozen pond and reeds",
            "a cliff and sea birds",
            "a meadow after a thunderstorm",
        ),
    ),
    "transport": (
        "a railway station with {}",
        (
            "an empty platform at night",
            "a clock and two benches",
            "a freight train passing",
            "luggage carts in a row",
            "sunlight through a glass roof",
            "a timetable and a vending machine",
        ),
    ),
    "indoors": (
        "a living room with {}",
        (
            "a striped sofa and a rug",
            "moving boxes and a ladder",
            "a piano and sheet music",
            "a fireplace and a pile of wood",
            "plants on every shelf",
            "a telescope by the window",
        ),
    ),
}
LIGHTS = ("", ", seen from above", ", in the evening")


def a(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def pairs(rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """Two different things, never the same two again."""
    names, seen = list(THINGS), set[frozenset[str]]()
    while len(seen) < count:
        one, other = rng.sample(names, 2)
        if frozenset((one, other)) not in seen:
            seen.add(frozenset((one, other)))
            yield one, other


def objects(rng: random.Random) -> Iterator[Row]:
    """One thing, two things, and things of a color."""
    for thing in rng.sample(list(THINGS), 40):
        yield {
            "prompt": f"a photo of {a(thing)} {rng.choice(PLACES)}",
            "category": "single",
            "objects": [thing],
        }
    for one, other in pairs(rng, 40):
        yield {"prompt": f"a photo of {a(one)} and {a(other)}", "category": "two", "objects": [one, other]}
    for one, other in pairs(rng, 40):
        first, second = rng.sample(COLORS, 2)
        colors = {one: first, other: second}
        yield {
            "prompt": f"a photo of {a(f'{first} {one}')} and {a(f'{second} {other}')}",
            "category": "colors",
            "objects": [one, other],
            "colors": colors,
        }


def counting(rng: random.Random) -> Iterator[Row]:
    """A number of things, and numbers of two kinds."""
    for number, word in NUMBERS.items():
        for thing in rng.sample(list(THINGS), 14):
            text = f"a photo of {word} {THINGS[thing]} {rng.choice(PLACES)}"
            yield {"prompt": text, "category": f"count_{number}", "count": {thing: number}}
    for one, other in pairs(rng, 30):
        first, second = rng.choice(list(NUMBERS)[:3]), rng.choice(list(NUMBERS)[:3])
        text = f"a photo of {NUMBERS[first]} {THINGS[one]} and {NUMBERS[second]} {THINGS[other]}"
        yield {"prompt": text, "category": "two_kinds", "count": {one: first, other: second}}


def positions(rng: random.Random) -> Iterator[Row]:
    """Where one thing is beside another."""
    sides = list(SIDES)
    for i, (one, other) in enumerate(pairs(rng, 120)):
        words = sides[i % len(sides)]
        yield {
            "prompt": f"a photo of {a(one)} {words} {a(other)}",
            "category": SIDES[words],
            "objects": [one, other],
            "relation": SIDES[words],
        }


def text(rng: random.Random) -> Iterator[Row]:
    """Words to be written, short and long, on three of the kinds of sign each."""
    for words in WORDS:
        for sign in rng.sample(SIGNS, 3):
            kind = "short" if " " not in words else "long"
            yield {"prompt": f'{sign} "{words}"', "category": kind, "text": words}


def styles(rng: random.Random) -> Iterator[Row]:
    """Every motif in every style."""
    for name, words in STYLES.items():
        for motif in MOTIFS:
            yield {"prompt": words.format(motif), "category": name, "motif": motif}


def scenes(rng: random.Random) -> Iterator[Row]:
    """Everyday places without people."""
    for name, (frame, details) in SCENES.items():
        for detail in details:
            for light in LIGHTS:
                yield {"prompt": frame.format(detail) + light, "category": name}


FILES = {
    "objects": objects,
    "counting": counting,
    "positions": positions,
    "text": text,
    "styles": styles,
    "scenes": scenes,
}


def rows(name: str) -> list[Row]:
    return list(FILES[name](random.Random(name)))


def lines(found: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (FOLDER / f"{name}.jsonl").write_text(lines(rows(name)), encoding="utf-8")
        print(f"{FOLDER / name}.jsonl: {len(rows(name))} prompts")
    sys.exit(0)
