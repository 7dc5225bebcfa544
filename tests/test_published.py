"""Recipes of real checkpoints and docs/published.md say the same, setting by setting."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import diffusers
import pytest
import yaml
from runs import ROOT

from mmalign.config import load_config
from mmalign.pipelines import catalog
from mmalign.pipelines.blueprint import read_blueprint
from mmalign.pipelines.family import schedule

RECIPES = sorted(recipe for recipes in catalog.RECIPES.values() for recipe in recipes)
# What changes speed and memory alone, which model and prompts these are, and how results are shown.
FREE = {
    *(
        "policy.model",
        "policy.chunk",
        "policy.gradient_checkpointing",
        "prompts.file",
        "prompts.heldout_file",
    ),
    *("algorithm.name", "training.batch", "evaluation.prompts", "evaluation.seeds", "evaluation.grid_every"),
    "run.dir",
}
ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """A setting: what was published of it, what is here, and why that differs."""

    published: str
    here: str
    why: str

    @property
    def value(self) -> Any:
        return yaml.safe_load(self.here.strip("`"))


def tables() -> dict[str, dict[str, Row]]:
    """The rows of each section of the page, by setting."""
    _, *sections = re.split(r"^## ", (ROOT / "docs/published.md").read_text(), flags=re.MULTILINE)
    return {
        section.split("\n", 1)[0]: {found[0]: Row(*found[1:]) for found in ROW.findall(section)}
        for section in sections
    }


TABLES = tables()
COMMON = TABLES.pop("All recipes")


def written(recipe: str) -> dict[str, Any]:
    """What the file of a recipe sets, by dotted names."""

    def flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(flat(yaml.safe_load((ROOT / f"assets/recipes/{recipe}.yaml").read_text())))


def test_every_recipe_of_a_real_model_has_its_table():
    assert sorted(TABLES) == RECIPES
    assert all(len(rows) > 15 for rows in TABLES.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_values_of_its_table(recipe):
    sets, config = written(recipe), load_config(ROOT / f"assets/recipes/{recipe}.yaml")
    for setting, row in (COMMON | TABLES[recipe]).items():
        found = sets[setting] if setting in sets else reduce(getattr, setting.split("."), config)
        assert (list(found) if isinstance(found, tuple) else found) == row.value, setting


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_a_recipe_is_in_its_table(recipe):
    assert written(recipe).keys() - FREE <= TABLES[recipe].keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_as_published_is_explained(recipe):
    for setting, row in (COMMON | TABLES[recipe]).items():
        assert row.why or row.published == row.here, setting


def test_the_noise_of_wan_is_the_second_sigma_of_its_schedule():
    config = load_config(ROOT / "assets/recipes/wan21_flow_grpo.yaml")
    _, kind, settings = read_blueprint(config.policy.model).parts["scheduler"]
    sigmas = schedule(getattr(diffusers, kind)(**settings), config.algorithm.steps, None, None)
    assert config.algorithm.noise.level == pytest.approx(float(sigmas[1]), abs=1e-3)
