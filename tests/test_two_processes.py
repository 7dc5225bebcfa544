"""Two processes with the same global batch do what one does."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import GIVEN, SCENARIOS, THROUGH, WRITING, gathered, given, through, tiny, train, writing
from torch.testing import assert_close

from mmalign.algorithms import ALGORITHMS
from mmalign.distributed import Distributed
from mmalign.testing import tiny_sd3

ROOT = Path(__file__).parents[1]
# Metrics that do not depend on how many processes share the work.
SAME = (
    *("reward/", "groups/", "loss", "grad_norm", "ratio", "kl", "clip", "updates", "samples"),
    *("balance/", "composition/", "value/", "loss_scale"),
)
CLOCK = ("seconds/", "share/", "memory/")  # metrics that are never the same twice
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> list[dict[str, Any]]:
    """What each of two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "ranks.py"), str(folder), str(pipeline)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=1200)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


def test_rows_of_any_size_are_gathered(ranks):
    assert [found["world"] for found in ranks] == [2, 2]
    assert ranks[0]["kind"] == "multi_cpu"
    for found in ranks:
        every = found["gathered"]
        assert every["ragged"].tolist() == [[10, 10, 10], [11, 11, 0], [11, 11, 0]]
        assert every["large"].tolist() == [2**62, 2**62 + 1]
        assert every["flags"].tolist() == [True, False]
        assert every["flags"].dtype == torch.bool
        assert every["none"].shape == (2, 1)
        assert every["any"].tolist() == [True, False]
        assert every["objects"].tolist() == [0, 1, 1]


@pytest.mark.filterwarnings("ignore:reward 'brightness'")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_learn_what_one_does(ranks, scenario):
    one, (first, second) = train(scenario, Distributed("cpu")), [found[scenario] for found in ranks]

    # Before any update has been made the two agree to the last bit.
    rows = [{(row["group"], row["member"]): row for row in found["rows"][0]} for found in (one, first)]
    assert rows[0].keys() == rows[1].keys()
    for name, row in rows[0].items():
        for field in ("prompt", "rewards", "advantage", "counted"):
            assert rows[1][name][field] == row[field]

    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, atol=2e-5, rtol=0)  # a step is 1e-3
    for mine, theirs in zip(one["average"], first["average"], strict=True):
        assert_close(theirs, mine, atol=2e-5, rtol=0)
    for step, metrics in one["metrics"].items():
        assert first["metrics"][step].keys() == metrics.keys()
        for name, value in metrics.items():
            if name.startswith(SAME):
                other = first["metrics"][step][name]
                lost = math.isnan(value) and math.isnan(other)
                assert lost or math.isclose(other, value, rel_tol=1e-3, abs_tol=1e-5), name
    assert second["metrics"] == {}


def test_two_processes_leave_out_the_same_updates(ranks):
    """Gradients that left the range of fp16, and a loss that only one of them knows to be NaN."""
    metrics = ranks[0]["half precision that overflows, split"]["metrics"][2]
    left_out = [metrics[f"updates/{name}"] for name in ("overflowed", "bad")]
    assert min(left_out) > 0
    assert metrics["updates"] == 9 - sum(left_out) > 0


@pytest.mark.parametrize("method", THROUGH)
def test_two_processes_differentiate_through_a_reward_as_one_does(ranks, method):
    one, (first, second) = through(method, Distributed("cpu")), [found[method] for found in ranks]
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, atol=2e-4, rtol=0)  # a step is 1e-2
    rewards = [[m["reward/value"] for m in found["metrics"].values()] for found in (one, first)]
    assert_close(*map(torch.tensor, rewards), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:reward 'claims'")
@pytest.mark.parametrize("scenario", WRITING)
def test_two_processes_learn_to_write_as_one_does(ranks, scenario):
    one, (first, second) = writing(scenario, Distributed("cpu")), [found[scenario] for found in ranks]
    rows = [{(row["group"], row["member"]): row for row in found["rows"][0]} for found in (one, first)]
    assert rows[0].keys() == rows[1].keys()
    for name, row in rows[0].items():
        for field in ("prompt", "advantage", "counted"):
            assert rows[1][name][field] == row[field]
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, atol=1e-3, rtol=0)  # a step is 1e-2


@pytest.mark.parametrize("method", GIVEN)
def test_two_processes_learn_what_is_given_as_one_does(ranks, pipeline, method):
    one = given(method, pipeline, Distributed("cpu"))
    first, second = (found[method] for found in ranks)
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, atol=3e-4, rtol=0)  # a step is 1e-3
    losses = [[metrics["loss"] for metrics in found["metrics"].values()] for found in (one, first)]
    assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=1e-4)


ALL = [*SCENARIOS, *THROUGH, *WRITING, *GIVEN, "tiny"]


@pytest.mark.parametrize("name", ALL)
def test_two_processes_that_were_stopped_end_bit_for_bit_as_two_that_ran_through(ranks, name):
    """What a method remembers (windows, trees, old policies, anchors, values) is state of the run."""
    for found in ranks:
        through, stopped = found[name], found["stopped"][name]
        assert through["weights"].keys() == stopped["weights"].keys()
        for key, weight in through["weights"].items():
            assert torch.equal(stopped["weights"][key], weight), key
        assert all(map(torch.equal, through["average"], stopped["average"]))
    through, stopped = ranks[0][name], ranks[0]["stopped"][name]
    assert stopped["metrics"].keys() == stopped["rows"].keys() == {1, 2}
    for step, metrics in stopped["metrics"].items():
        for key, value in through["metrics"][step].items():
            if not key.startswith(CLOCK):
                assert metrics[key] == value, key
        assert stopped["rows"][step] == through["rows"][step]


def test_every_method_is_among_them():
    tables = [*SCENARIOS.values(), *WRITING.values()]
    methods = [*(given["algorithm"] for given in tables), *THROUGH.values(), *GIVEN.values()]
    named = {f"{type(method).__module__}:{type(method).__name__}" for method in methods}
    assert named == set(ALGORITHMS.values())


def test_two_processes_train_a_real_pipeline_as_one_does(ranks, pipeline):
    one, (first, second) = tiny(pipeline, Distributed("cpu")), [found["tiny"] for found in ranks]
    for row in one["rows"][0]:
        (other,) = (r for r in first["rows"][0] if (r["group"], r["member"]) == (row["group"], row["member"]))
        assert math.isclose(other["rewards"]["brightness"], row["rewards"]["brightness"], abs_tol=1e-6)
        assert math.isclose(other["advantage"], row["advantage"], abs_tol=1e-2)
    moved = 0.0
    for name, weight in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert_close(first["weights"][name], weight, atol=3e-4, rtol=0)  # three steps of 1e-3
        moved += float((first["weights"][name] - weight).abs().mean()) / len(one["weights"])
    assert moved < 2e-5


def test_alone_gathering_changes_nothing():
    every = gathered(Distributed("cpu"))
    assert every["ragged"].tolist() == [[10, 10, 10]]
    assert every["objects"].tolist() == [0]
