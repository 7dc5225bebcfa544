"""Write the table of recipes of real checkpoints into docs/planning.md: python scripts/plan_recipes.py

Each is planned on the meta device for 8 devices, in a quarter of a minute. Where recipes are named as
arguments, the rows of the others stay.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from mmalign.config import load_config  # noqa: E402
from mmalign.pipelines.catalog import RECIPES  # noqa: E402
from mmalign.planning import HEAD, rehearse, row  # noqa: E402

PAGE = ROOT / "docs" / "planning.md"
TABLE = re.compile(re.escape(HEAD) + r"((?:\|.*\n)*)")


def planned(recipe: str) -> str:
    """The row of a recipe of assets/recipes/."""
    config = load_config(ROOT / f"assets/recipes/{recipe}.yaml")
    return row(recipe, config, rehearse(config, gpus=8)[1])


def main(only: list[str]) -> None:
    recipes = [recipe for recipes in RECIPES.values() for recipe in recipes]
    if unknown := set(only) - set(recipes):
        sys.exit(
            f"no recipe of a real checkpoint: {', '.join(sorted(unknown))}; they are {', '.join(recipes)}"
        )
    os.chdir(ROOT)  # recipes name their prompts from here
    page = PAGE.read_text()
    table = TABLE.search(page)
    if table is None:
        sys.exit(f"{PAGE} has no table with the head\n{HEAD}")
    rows = {line.split("`")[1]: line for line in table[1].splitlines(keepends=True)}
    for recipe in recipes:
        if not only or recipe in only or recipe not in rows:
            rows[recipe] = planned(recipe)
            print(rows[recipe], end="", flush=True)
    whole = HEAD + "".join(rows[recipe] for recipe in recipes)
    PAGE.write_text(page.replace(table[0], whole))


if __name__ == "__main__":
    main(sys.argv[1:])
