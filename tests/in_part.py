"""Trains networks of which a forward leaves weights unread; as a script it is one of several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import kept
from toys import Notes

from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.distributed import Distributed
from mmalign.pipelines import load
from mmalign.records import Outcome, RewardSignal
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

# Policies of tiny models, by the names of their folders.
POLICIES: dict[str, dict[str, Any]] = {
    "experts": {"lora": LoraSettings(4, 8), "frames": 5, "max_sequence_length": 16},
    "qwen": {"lora": LoraSettings(0), "max_sequence_length": 120},
}


class Bright:
    name = "bright"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, outcome.media.flatten(1).mean(1)[:, None])


def learn(home: Path, name: str, distributed: Distributed) -> dict[str, Any]:
    """Two iterations of three updates, whose forwards are each of a few steps."""
    algorithm = FlowGRPO(steps=4, clip=1e-2)
    policy = load(PolicySettings(str(home / name), height=32, width=48, **POLICIES[name]), algorithm.noise)
    notes, texts = Notes(), ("a red cat", "two dogs", "a blue hat")
    prompts = PromptSource([Prompt(text) for text in texts], 3, 4, 0)
    settings = TrainingSettings(2, learning_rate=1e-3, batch=5, updates=3, noise_floor="warn")
    Trainer(
        policy, algorithm.build({"bright": 1.0}), Scorer([Bright()]), prompts, settings, distributed, notes
    ).run()
    return kept(policy, notes, distributed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world, folder = Distributed("cpu"), Path(sys.argv[1])
    found = {name: learn(folder, name, world) for name in POLICIES}
    torch.save(found, folder / f"rank_{world.rank}.pt")
    world.close()
