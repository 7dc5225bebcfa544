"""The page of claims names tests that exist, and leaves no claim without a test or a reason."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/must_test.md").read_text()


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(\w+)::(\w+)`", PAGE)
    files = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests").rglob("test_*.py")}
    known = {
        (stem, node.name.removeprefix("test_"))
        for stem in {file for file, _ in named} & files.keys()
        for node in ast.walk(ast.parse(files[stem].read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert [f"{file}::{test}" for file, test in named if (file, test) not in known] == []
    assert len(named) > 200


def test_every_row_has_a_claim_and_a_test_or_a_reason():
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    assert all(len(cells) == 2 and all(cell.strip() for cell in cells) for cells in rows)
