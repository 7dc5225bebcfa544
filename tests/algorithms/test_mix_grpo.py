"""MixGRPO: where the window is and when, its limits, Flash, and what it costs (arXiv:2507.21802)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from methods import G, N, assert_counts, assert_learns, assert_resumes, run
from toys import ToyFlow, names

from mmalign import rollout
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.algorithms.mix_grpo import MixGRPO
from mmalign.credit import zscore
from mmalign.records import Plan
from mmalign.sde import Noise

SMALL = MixGRPO(steps=8, width=2, interval=4, clip=1e-2)


def starts(method: MixGRPO, iterations: int, seed: int = 0) -> list[int]:
    plans = method.build({"r": 1.0}).plans
    found = [plans(i, seed)[0].sde_steps for i in range(iterations)]
    assert all(steps == tuple(range(steps[0], steps[0] + method.width)) for steps in found)
    return [steps[0] for steps in found]


def test_the_defaults_are_the_papers():
    built = MixGRPO().build({"r": 1.0})
    assert built.plans(0, 0) == [Plan(25, (0, 1, 2, 3), share_noise=True)]
    assert (built.objective.low, built.objective.kl, built.credit.clip) == (1e-4, 0.0, 5.0)
    assert (built.credit.combine, built.credit.normalize) == ("normalized", zscore)
    assert built.noise == Noise("flow", 0.7)
    assert starts(MixGRPO(), 51)[::25] == [0, 1, 2]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_progressive_window_moves_to_the_end_and_stays_there(stride):
    method = replace(SMALL, stride=stride)
    found = starts(method, 60)
    moves = math.ceil(method.last / stride)
    assert found[: 4 * moves] == [min(stride * (i // 4), method.last) for i in range(4 * moves)]
    assert set(found[4 * moves :]) == {method.last}
    assert max(found) + method.width == method.steps - 1


def stays(method: MixGRPO) -> list[int]:
    found = starts(method, 2000)
    return [found.count(start) for start in range(method.last)]


def test_decaying_stays_fall_from_the_interval_to_a_quarter_of_it():
    method = MixGRPO(steps=15, width=4, interval=24, schedule="decay")
    assert stays(method) == [int(24 - 18 * start / 10) for start in range(10)]


def test_exponentially_decaying_stays_hold_to_the_threshold():
    method = MixGRPO(schedule="exp_decay")
    assert stays(method) == [math.ceil(25 * math.exp(-0.1 * max(0, start - 13))) for start in range(20)]
    assert stays(method)[:14] == [25] * 14


def test_frozen_and_random_windows():
    assert set(starts(replace(SMALL, schedule="frozen"), 50)) == {0}
    random = replace(SMALL, schedule="random")
    assert set(starts(random, 200)) == set(range(6))
    assert starts(random, 50) == starts(random, 50) != starts(random, 50, seed=1)


def test_a_window_of_all_steps_is_flow_grpo():
    mix = MixGRPO(steps=5, width=4, clip=1e-2, share_noise=False)
    full = FlowGRPO(steps=5, clip=1e-2, kl=0.0, std="group")
    one, two = (run(method, 3) for method in (mix, full))
    for a, b in zip(one[0].learner.parameters, two[0].learner.parameters, strict=True):
        assert torch.equal(a, b)


def test_without_a_window_there_would_be_nothing_to_learn():
    """That a plan without actions gives the pictures of the ODE is tested in tests/pipelines."""
    with pytest.raises(ValueError, match=r"width must lie in 1\.\.7"):
        replace(SMALL, width=0)


def test_samples_from_one_noise_coincide_up_to_the_window():
    policy = ToyFlow(SMALL.noise)
    plans = SMALL.build({"r": 1.0}).plans
    replay = policy.sample(names(2, 4), plans(12, 0)[0], (0, "t")).replay
    assert torch.equal(replay["x"][:4, 0], replay["x"][:1, 0].expand(4, -1, -1, -1))
    assert len(replay["x_next"][:4, 0].flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("schedule", "rate", "iteration", "tail"),
    [
        ("progressive", 0.4, 0, 8),
        ("progressive", 0.4, 100, 6),
        ("frozen", 0.2, 100, 4),
        ("random", 0.0, 3, 0),
    ],
)
def test_flash_takes_a_share_of_the_steps_that_are_left(schedule, rate, iteration, tail):
    plan = MixGRPO(schedule=schedule, rate=rate).build({"r": 1.0}).plans(iteration, 0)[0]
    left = 25 - 4 - plan.sde_steps[0]
    assert plan.tail == tail == (max(math.floor(rate * left), 1) if rate else 0)


def test_flash_ends_nearer_to_the_fine_solution_than_euler_with_as_many_steps(monkeypatch):
    def ends(tail: int) -> torch.Tensor:
        return ToyFlow(SMALL.noise).sample(names(2, 8), Plan(24, (0,), tail=tail), (0, "t")).outcome.media

    fine, flash = ends(23), ends(4)
    second = rollout.multistep
    monkeypatch.setattr(
        rollout, "multistep", lambda x, v, sigma, after, before: second(x, v, sigma, after, None)
    )
    plain = ends(4)  # without a past the step is Euler's
    assert (flash - fine).norm() < 0.7 * (plain - fine).norm()


@pytest.mark.parametrize("iteration", [0, 9])
def test_forwards(iteration):
    saved, start = N - N // G, iteration // 4
    assert assert_counts(SMALL, iteration) == (N * 8 - saved * (start + 1), N * 2 - saved)
    independent = replace(SMALL, share_noise=False)
    assert assert_counts(independent, iteration) == (N * 8, N * 2)
    flash = replace(SMALL, rate=0.4)
    tail = max(math.floor(0.4 * (8 - start - 2)), 1)
    assert assert_counts(flash, iteration)[0] == N * (start + 2 + tail) - saved * (start + 1)
    pulled = run(replace(SMALL, kl=0.1), iteration + 1)[0].policy.forwards
    assert pulled.reference == pulled.train


@pytest.mark.parametrize(
    "method",
    [SMALL, replace(SMALL, rate=0.4), replace(SMALL, schedule="random", noise=Noise("cps", 0.8))],
    ids=["plain", "flash", "random, cps"],
)
def test_it_learns(method):
    assert_learns(method, 0.2)


def test_it_resumes_with_the_window_where_it_was(tmp_path):
    assert_resumes(replace(SMALL, interval=2, rate=0.5), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"width": 25}, {"interval": 0}, {"stride": 0}, {"decay": -1.0}, {"decay_after": -1}, {"rate": 1.5}],
)
def test_settings_that_cannot_work_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MixGRPO(**wrong)
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        MixGRPO(noise=Noise("flow", 0.0))
