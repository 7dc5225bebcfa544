"""What every method must do with the toy: run through the real trainer, learn, resume, and count its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from toys import Notes, Redness, ToyFlow, source

from mmalign.contracts import RewardModel
from mmalign.plans import forwards
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

N, G = 32, 8  # samples, and members of a group


def trainer(
    method: Any,
    iterations: int = 1,
    rewards: Sequence[RewardModel] = (),
    weights: Mapping[str, float] | None = None,
    run_dir: Path | None = None,
    groups: int = N // G,
    members: int = G,
    **settings: Any,
) -> tuple[Trainer, Notes]:
    """A trainer of the toy; weights: of the rewards, 1 where none is given."""
    rewards, notes = rewards or [Redness()], Notes()
    algorithm = method.build({model.name: (weights or {}).get(model.name, 1.0) for model in rewards})
    found = Trainer(
        ToyFlow(algorithm.noise),
        algorithm,
        Scorer(list(rewards)),
        source(groups, members),
        replace(TrainingSettings(iterations=iterations, learning_rate=1e-2, batch=1000), **settings),
        tracker=notes,  # type: ignore[arg-type]
        run_dir=run_dir,
    )
    return found, notes


def run(method: Any, iterations: int = 1, **given: Any) -> tuple[Trainer, Notes]:
    found, notes = trainer(method, iterations, **given)
    found.run()
    return found, notes


def assert_learns(method: Any, by: float = 0.3, iterations: int = 30, **given: Any) -> Notes:
    """The reward of the toy rises by so much."""
    _, notes = run(method, iterations, **given)
    scores = [metrics["reward/redness"] for metrics in notes.metrics.values()]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + by, f"{first:.3f} to {last:.3f}"
    return notes


def assert_resumes(method: Any, folder: Path, iterations: int = 5, **given: Any) -> None:
    """A run that was stopped half-way and made anew goes on to the last bit as one that ran through."""
    through, seen = run(method, iterations, save_every=2, run_dir=folder / "through", **given)
    trainer(method, iterations - 2, run_dir=folder / "stopped", save_every=2, **given)[0].run()
    again, rest = trainer(method, iterations, run_dir=folder / "stopped", save_every=2, **given)
    again.run()
    assert min(rest.metrics) == iterations - 2
    for one, two in zip(through.learner.parameters, again.learner.parameters, strict=True):
        assert torch.equal(one, two)
    mine, theirs = (found.policy.copies.state_dict() for found in (through, again))
    assert mine.keys() == theirs.keys()
    for name, tensors in mine.items():
        assert all(map(torch.equal, tensors, theirs[name]))
    for step, metrics in rest.metrics.items():
        for name, value in metrics.items():
            if not name.startswith(("seconds/", "share/", "memory/")):
                assert value == seen.metrics[step][name], name


def assert_counts(method: Any, iteration: int = 0, keep: int = N, **given: Any) -> tuple[int, int]:
    """Forwards of an iteration as they were made; they are those that the printed plan foretells."""
    found, _ = trainer(method, iteration + 1, **given)
    found.step(iteration)
    counts = found.policy.forwards
    plans, group = found.algorithm.plans(iteration, 0), torch.arange(N // G).repeat_interleave(G)
    member = torch.arange(G).repeat(N // G)
    few = member < keep // (N // G)  # who is learned from, if not all
    foretold = [
        (forwards(plan, group, member)[0], forwards(plan, group[few], member[few])[1]) for plan in plans
    ]
    assert (counts.sample, counts.train) == tuple(map(sum, zip(*foretold, strict=True)))
    return counts.sample, counts.train
