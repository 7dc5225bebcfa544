"""The prompt files are what the script writes, and speak of what they say they do."""

import importlib.util
import re
from pathlib import Path

import pytest

from mmalign.data import read_prompts

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_prompts", ROOT / "scripts/make_prompts.py")
make_prompts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_prompts)


@pytest.mark.parametrize("name", make_prompts.FILES)
def test_a_file_is_what_the_script_writes(name):
    written = (ROOT / f"assets/prompts/{name}.jsonl").read_text(encoding="utf-8")
    assert written == make_prompts.lines(make_prompts.rows(name))


@pytest.mark.parametrize("name", make_prompts.FILES)
def test_a_file_holds_60_to_200_different_prompts_of_several_categories(name):
    prompts = read_prompts(ROOT / f"assets/prompts/{name}.jsonl")
    assert 60 <= len({prompt.text for prompt in prompts}) == len(prompts) <= 200
    kinds = [prompt.extra["category"] for prompt in prompts]
    assert len(set(kinds)) >= 2
    assert min(map(kinds.count, set(kinds))) >= 10


def test_what_a_verifier_is_told_stands_in_the_prompt():
    for name in make_prompts.FILES:
        for prompt in read_prompts(ROOT / f"assets/prompts/{name}.jsonl"):
            for thing in prompt.extra.get("objects", []):
                assert thing in prompt.text
            for thing, color in prompt.extra.get("colors", {}).items():
                assert f"{color} {thing}" in prompt.text
            for thing, number in prompt.extra.get("count", {}).items():
                assert f"{make_prompts.NUMBERS[number]} {make_prompts.THINGS[thing]}" in prompt.text
            if "text" in prompt.extra:
                assert f'"{prompt.extra["text"]}"' in prompt.text


def test_there_are_no_people_in_everyday_scenes():
    people = r"\b(man|men|woman|women|people|person|child|children|boy|girl|crowd|face|hand)s?\b"
    assert not [row for row in make_prompts.rows("scenes") if re.search(people, row["prompt"])]
