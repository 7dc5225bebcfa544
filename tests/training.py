"""Runs a method with the toy policy through the real loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from toys import Notes, Redness, ToyFlow, source

from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

GROUPS, MEMBERS = 4, 8


def trainer(method: Any, iterations: int = 1, folder: Path | None = None, **settings: Any) -> Trainer:
    """A trainer on the reward "redness"; reward and policy are given to replace the usual ones."""
    reward, policy = settings.pop("reward", Redness()), settings.pop("policy", None)
    algorithm = method.build({reward.name: 1.0})
    usual = TrainingSettings(iterations=iterations, learning_rate=1e-2, batch=1000)
    return Trainer(
        policy or ToyFlow(algorithm.noise),
        algorithm,
        Scorer([reward]),
        settings.pop("prompts", None) or source(GROUPS, MEMBERS),
        replace(usual, **settings),
        tracker=Notes(),  # type: ignore[arg-type]
        run_dir=folder,
    )


def rise(method: Any, iterations: int = 30, **settings: Any) -> float:
    """How much higher the reward of the last three iterations is than that of the first three."""
    found = trainer(method, iterations, **settings)
    found.run()
    name = found.scorer.rewards[0].name
    scores = [metrics[f"reward/{name}"] for metrics in found.tracker.metrics.values()]  # type: ignore[attr-defined]
    return (sum(scores[-3:]) - sum(scores[:3])) / 3
