"""A run that is killed at chosen moments; as a script it goes through all of them, a process for each."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from toys import Redness, ToyFlow, source

from mmalign import checkpoints
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.records import Outcome, RewardSignal
from mmalign.scoring import Scorer
from mmalign.tracking import RunTracker
from mmalign.trainer import Trainer, TrainingSettings

FIELDS = ("seconds/", "share/", "memory/")  # metrics that no run repeats
WHEN = ("in a reward", "in a checkpoint", "in an update", "after a log")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Learned(Redness):
    """Changes as it sees more, and draws from the global generator, as careless rewards do."""

    def __init__(self) -> None:
        super().__init__("learned")
        self.seen = 0.0
        self.fatal = 0

    def __call__(self, outcome: Outcome) -> RewardSignal:
        self.fatal -= 1
        if self.fatal == 0:
            die()
        values = super().__call__(outcome).values
        return RewardSignal(self.name, values + 0.01 * self.seen * torch.rand(values.shape))

    def fit(self, outcome: Outcome) -> dict[str, float]:
        self.seen += float(super().__call__(outcome).values.mean())
        return {"seen": self.seen}

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert isinstance(state["seen"], float)
        self.seen = state["seen"]


def make(run_dir: Path, iterations: int) -> Trainer:
    torch.manual_seed(0)
    random.seed(0)  # forked processes draw anew
    method = FlowGRPO(steps=4, clip=1e-2, kl=0.1)
    settings = TrainingSettings(iterations=iterations, learning_rate=1e-2, batch=5, save_every=2, warmup=6)
    return Trainer(
        ToyFlow(method.noise),
        method.build({"learned": 1.0}),
        Scorer([Learned()]),
        source(),
        settings,
        tracker=RunTracker(run_dir, tensorboard=False),
        run_dir=run_dir,
    )


def arm(run: Trainer, when: str) -> None:
    """Let the run be killed in its third iteration from here, its next checkpoint or after its next row."""
    reward = run.scorer.rewards[0]
    assert isinstance(reward, Learned)
    if when == "in a reward":
        reward.fatal = 3
    elif when == "in a checkpoint":
        run.policy.save = lambda folder, state: ((folder / "half").write_text("x"), die())  # type: ignore
    elif when == "in an update":
        step, calls = run.learner.optimizer.step, []

        def fatal() -> None:
            step()
            calls.append(0)
            if len(calls) == 5:
                die()

        run.learner.optimizer.step = fatal  # type: ignore
    else:
        log = run.tracker.log
        run.tracker.log = lambda step, metrics: (log(step, metrics), die())  # type: ignore


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    make(folder / "through", 7).run()
    told = []
    for when in (*WHEN, ""):
        last = checkpoints.latest(folder / "killed")
        child = os.fork()
        if child == 0:
            run = make(folder / "killed", 7)
            if when:
                arm(run, when)
            run.run()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        told.append({"when": when, "signal": ended, "went_on_from": int(last.name[5:]) if last else 0})
    print(json.dumps(told))
