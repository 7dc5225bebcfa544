"""Flow-GRPO and its fast form: settings of the paper, exact counts of forwards, and that they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toys import Notes, Redness, ToyFlow, source

from mmalign.algorithms import ALGORITHMS
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.algorithms.flow_grpo_fast import FlowGRPOFast
from mmalign.credit import zscore, zscore_batch
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

N, G, T = 32, 8, 6
FLOW = Noise("flow", 0.7)


def run(method: FlowGRPO | FlowGRPOFast, iterations: int = 1, **settings: object) -> tuple[Trainer, Notes]:
    notes = Notes()
    found = Trainer(
        ToyFlow(method.noise),
        method.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(N // G, G),
        replace(TrainingSettings(iterations=iterations, learning_rate=1e-2, batch=1000), **settings),  # type: ignore[arg-type]
        tracker=notes,  # type: ignore[arg-type]
    )
    found.run()
    return found, notes


@pytest.mark.parametrize("batch", [7, 1000])
def test_forwards_of_flow_grpo(batch):
    counts = run(FlowGRPO(steps=T, kl=0.0), batch=batch)[0].policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * T, N * (T - 1), 0)
    counts = run(FlowGRPO(steps=T, kl=0.1), batch=batch)[0].policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * T, N * (T - 1), N * (T - 1))


@pytest.mark.parametrize("batch", [7, 1000])
@pytest.mark.parametrize("width", [1, 2])
def test_forwards_of_the_fast_form(batch, width):
    method = FlowGRPOFast(steps=T, width=width, clip=1e-2, share_noise=False)
    counts = run(method, batch=batch)[0].policy.forwards
    assert (counts.sample, counts.train) == (N * T, N * width)
    found, notes = run(replace(method, share_noise=True), batch=batch)
    start = min(int(k.split("/")[-1]) for k in notes.metrics[0] if k.startswith("by_step/ratio/"))
    saved = N - N // G
    assert found.policy.forwards.sample == N * T - saved * (start + 1)
    assert found.policy.forwards.train == N * width - saved


def test_the_defaults_are_the_papers():
    full = FlowGRPO().build({"r": 1.0})
    assert full.plans(0, 0)[0].sde_steps == tuple(range(9))
    assert (full.objective.low, full.objective.high, full.objective.kl) == (1e-4, 1e-4, 0.04)
    assert full.credit.combine == "total_first"
    assert full.credit.clip == 5.0
    assert full.credit.normalize.func is zscore_batch
    assert full.copies == {"reference": 1.0}
    assert full.noise == Noise("flow", 0.7)
    assert FlowGRPO(std="group", unbiased=True).build({"r": 1.0}).credit.normalize.func is zscore
    fast = FlowGRPOFast().build({"r": 1.0})
    plans = [fast.plans(i, 0)[0] for i in range(100)]
    assert {len(p.sde_steps) for p in plans} == {2}
    assert {p.sde_steps[0] for p in plans} == {0, 1, 2, 3}
    assert all(p.share_noise for p in plans)
    assert (fast.objective.low, fast.objective.kl, fast.copies) == (1e-5, 0.0, {})


@pytest.mark.parametrize(("width", "within"), [(2, 4), (1, 1), (3, 9)])
def test_a_window_lies_within_the_first_steps_and_takes_each_of_them(width, within):
    algorithm = FlowGRPOFast(width=width, within=within).build({"r": 1.0})
    steps = {step for i in range(200) for step in algorithm.plans(i, 0)[0].sde_steps}
    assert steps == set(range(within))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        FlowGRPO(noise=Noise("flow", 0.0))
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        FlowGRPOFast(noise=Noise("cps", 0.0))
    with pytest.raises(ValueError, match=r"width must lie in 1..5"):
        FlowGRPOFast(width=6)
    with pytest.raises(ValueError, match=r"width must lie in 1..3"):
        FlowGRPOFast(width=4, within=3)
    with pytest.raises(ValueError, match=r"within must lie in 0..9"):
        FlowGRPOFast(within=10)


@pytest.mark.parametrize(
    "method",
    [
        FlowGRPO(steps=5, clip=1e-2, kl=0.0),
        FlowGRPO(steps=5, clip=1e-2, kl=0.01),
        FlowGRPOFast(steps=6, clip=1e-2),
        FlowGRPOFast(steps=6, clip=1e-2, share_noise=False, noise=FLOW),
    ],
)
def test_the_reward_rises(method):
    _, notes = run(method, iterations=30)
    scores = [m["reward/redness"] for m in notes.metrics.values()]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


def test_the_pull_to_the_base_model_holds_the_policy_back():
    free, held = (
        run(FlowGRPO(steps=5, clip=1e-2, kl=kl), iterations=30)[1].metrics[29] for kl in (1e-9, 1.0)
    )
    assert held["kl"] < free["kl"] / 2
    assert held["reward/redness"] < free["reward/redness"]


def test_every_name_in_the_table_leads_to_a_method():
    from importlib import import_module

    for key, place in ALGORITHMS.items():
        module, name = place.split(":")
        trust = key == "trust_grpo"  # the one with a setting that has no default
        method = getattr(import_module(module), name)(**({"thinking": "watched"} if trust else {}))
        assert method.build({"r": 1.0, "watched": 0.3 if trust else 0.0}).plans(0, 0)
