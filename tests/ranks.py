"""Trains in several ways and keeps what came out; run as a script it is one of several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from known import TWO, Judge, policy_of
from known import source as known_source
from runs import ROOT
from torch import Tensor
from toys import Brightness, Notes, Redness, ToyFlow, source
from words import Claims, Rubric, ToyWriter, Truth, pictures

from mmalign.algorithms.awm import AWM
from mmalign.algorithms.branch_grpo import BranchGRPO
from mmalign.algorithms.claimdiff import ClaimDiffRL
from mmalign.algorithms.crd import CRD
from mmalign.algorithms.dance_grpo import DanceGRPO
from mmalign.algorithms.ddpo import DDPO
from mmalign.algorithms.dense_grpo import DenseGRPO
from mmalign.algorithms.dgpo import DGPO
from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.distill import Distill
from mmalign.algorithms.dpok import DPOK, ValueSettings
from mmalign.algorithms.draft import DRaFT
from mmalign.algorithms.drpo import DRPO
from mmalign.algorithms.flow_dppo import FlowDPPO
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.algorithms.flow_grpo_fast import FlowGRPOFast
from mmalign.algorithms.g2rpo import G2RPO
from mmalign.algorithms.gardo import GARDO
from mmalign.algorithms.grpo import GRPO
from mmalign.algorithms.grpo_guard import GRPOGuard
from mmalign.algorithms.igpo import IGPO
from mmalign.algorithms.lirefl import LIReFL
from mmalign.algorithms.mix_grpo import MixGRPO
from mmalign.algorithms.pow3r import POW3R
from mmalign.algorithms.pref_grpo import PrefGRPO
from mmalign.algorithms.refl import ReFL
from mmalign.algorithms.sage_grpo import SAGEGRPO
from mmalign.algorithms.sft import SFT
from mmalign.algorithms.srpo import SRPO
from mmalign.algorithms.tempflow_grpo import TempFlowGRPO
from mmalign.algorithms.trajectory_balance import TrajectoryBalance
from mmalign.algorithms.trust_grpo import TrustGRPO
from mmalign.algorithms.tw_grpo import TWGRPO
from mmalign.assembly import composed
from mmalign.composition import Composer
from mmalign.compositions import GDPO, MARBLE, Constrained, Limit, Ordered
from mmalign.contracts import LoraSettings, Policy, PolicySettings
from mmalign.data import Prompt, PromptSource, read_prompts
from mmalign.distributed import Distributed
from mmalign.loss_scale import LossScale
from mmalign.objectives import ClippedRatio, Measures
from mmalign.pipelines import CaptionPolicy, load
from mmalign.pipelines.flow import FlowPolicy
from mmalign.records import Minibatch, Outcome, Prompts, Renoise, RewardSignal
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

LAB = ROOT / "assets/lab"


class Patchy(Brightness):
    """Has no verdict on some samples, whoever holds them."""

    def __call__(self, outcome: Outcome) -> RewardSignal:
        signal = super().__call__(outcome)
        names = outcome.prompts.group * 7 + outcome.prompts.member
        return RewardSignal(self.name, torch.where(names[:, None] % 5 == 0, torch.nan, signal.values))


class Brighter:
    """Prefers the brighter picture."""

    def __init__(self, both_orders: bool = True) -> None:
        self.name, self.both_orders = "brightness", both_orders

    def prefer(self, prompts: Prompts, first: Tensor, second: Tensor) -> Tensor:
        return ((first.mean((1, 2, 3)) - second.mean((1, 2, 3))).sign() + 1) / 2


class Lost(ClippedRatio):
    """Its loss is NaN where one sample of prompt 0 is in a minibatch: on the rank that holds it."""

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        losses, measures = super().__call__(policy, batch)
        prompts = batch.trajectory.outcome.prompts
        rows = batch.pick.rows[batch.weight > 0].tolist()
        lost = any(prompts.text[row] == "0" and prompts.member[row] == 0 for row in rows)
        return (losses * torch.nan if lost else losses), measures


TWICE, ALIKE = Renoise(2), Renoise(2, shared=True)
FULL = FlowGRPO(steps=4, clip=1e-2, kl=0.1)
FAST = FlowGRPOFast(steps=6, clip=1e-2, noise=Noise("flow", 0.7))
THROUGH = {"refl": ReFL(steps=5), "draft": DRaFT(steps=5, last=2), "srpo": SRPO(steps=5, margin=9.0)}
DANCE = DanceGRPO(steps=5, keep=2, clip=1e-2, noise=Noise("dance", 0.7))
MIX = MixGRPO(steps=6, width=2, interval=1, rate=0.5, clip=1e-2)
GUARD = GRPOGuard(steps=4, clip=1e-2)
DPPO = FlowDPPO(steps=6, delta=1e-6, share_noise=True, kl=0.1)
GATED = GARDO(steps=4, clip=1e-2, kl=0.5, share=0.2, reset_every=2)
SCENARIOS: dict[str, dict[str, Any]] = {
    "groups whole on a rank": {"algorithm": FULL, "groups": 4, "members": 4},
    "groups split across ranks": {"algorithm": FULL, "groups": 3, "members": 6, "updates": 3},
    "updates that not all ranks take part in": {"algorithm": FULL, "groups": 4, "members": 4, "updates": 4},
    "shared noise, split": {"algorithm": FAST, "groups": 3, "members": 4, "updates": 1},
    "singular actions, split": {
        "algorithm": G2RPO(steps=6, trained=(0, 2), strides=(1, 2), clip=1e-2),
        "groups": 3,
        "members": 6,
        "updates": 1,
    },
    "branches of two starts": {
        "algorithm": TempFlowGRPO(steps=5, starts=2, width=2, clip=1e-2),
        "groups": 3,
        "members": 6,
        "updates": 1,
    },
    "a tree, pruned and split": {
        "algorithm": BranchGRPO(steps=5, splits=(0, 1), width="top", depth=3, depth_stop=3, clip=1e-2),
        "groups": 3,
        "members": 4,
        "updates": 1,
        "reward": Patchy(),
    },
    "gains of steps": {"algorithm": DenseGRPO(steps=4, clip=1e-2), "groups": 3, "members": 4, "updates": 1},
    "an anchor that moves": {
        "algorithm": SAGEGRPO(steps=4, clip=1e-2, move_every=2),
        "groups": 3,
        "members": 4,
        "updates": 3,
    },
    "steps of DDIM without a clip": {
        "algorithm": DDPO(steps=4, clip=None, kl=0.1),
        "groups": 4,
        "members": 4,
    },
    "compared with past rewards": {
        "algorithm": DDPO(steps=4, clip=None, buffer=6, least=4),
        "groups": 3,
        "members": 2,
        "updates": 1,
        "reward": Patchy(),
    },
    "a baseline that is learned": {
        "algorithm": DPOK(steps=4, clip=1e-2, kl=0.1, value=ValueSettings(1e-2, epochs=3, batch=8)),
        "groups": 3,
        "members": 2,
        "updates": 1,
        "reward": Patchy(),
    },
    "best of n, a part of the steps": {"algorithm": DANCE, "groups": 3, "members": 6, "updates": 1},
    "a moving window, second order after it": {"algorithm": MIX, "groups": 3, "members": 4, "updates": 1},
    "guarded ratios": {"algorithm": GUARD, "groups": 3, "members": 4, "updates": 3},
    "masked by divergence": {"algorithm": DPPO, "groups": 3, "members": 4, "updates": 3},
    "a gated pull and a reference that moves": {"algorithm": GATED, "groups": 3, "members": 4, "updates": 1},
    "missing verdicts": {"algorithm": FULL, "groups": 4, "members": 4, "reward": Patchy()},
    "noised again": {"algorithm": DiffusionNFT(steps=3, renoise=TWICE), "groups": 4, "members": 4},
    "ratio of a sample": {
        "algorithm": AWM(steps=3, renoise=TWICE, ratio="sample"),
        "groups": 3,
        "members": 4,
        "updates": 3,
    },
    "halves of a group, split": {
        "algorithm": DGPO(steps=3, renoise=ALIKE, live_until=1),
        "groups": 3,
        "members": 6,
        "updates": 3,
    },
    "centered, missing verdicts": {
        "algorithm": CRD(steps=3, renoise=TWICE, kl_guidance=None),
        "groups": 3,
        "members": 6,
        "updates": 1,
        "reward": Patchy(),
    },
    "best and worst, split": {
        "algorithm": DiffusionDPO(steps=3, renoise=ALIKE),
        "groups": 3,
        "members": 4,
        "updates": 1,
    },
    "judge of pairs": {
        "algorithm": PrefGRPO(steps=3, clip=1e-2),
        "groups": 4,
        "members": 3,
        "reward": Brighter(),
    },
    "judge of pairs, split": {
        "algorithm": PrefGRPO(steps=3, clip=1e-2),
        "groups": 3,
        "members": 4,
        "updates": 1,
        "reward": Brighter(both_orders=False),
    },
    "balanced, missing verdicts": {
        "algorithm": DiffusionNFT(steps=3, renoise=TWICE, kl=0.1),
        "composition": MARBLE(every=2),
        "groups": 3,
        "members": 4,
        "updates": 3,
        "reward": Patchy(),
    },
    "balanced ratios, split": {
        "algorithm": FULL,
        "composition": MARBLE(every=1),
        "groups": 3,
        "members": 6,
        "updates": 1,
    },
    "normalized over the batch, split": {
        "algorithm": FULL,
        "composition": GDPO(),
        "groups": 3,
        "members": 6,
        "updates": 1,
    },
    "compared in order, split": {
        "algorithm": FULL,
        "composition": Ordered(("redness", "brightness"), {"redness": 0.5}),
        "groups": 3,
        "members": 6,
        "updates": 1,
        "reward": Patchy(),
    },
    "within limits": {
        "algorithm": FULL,
        "composition": Constrained({"brightness": Limit(0.2, above=0.5)}),
        "groups": 4,
        "members": 4,
        "reward": Patchy(),
    },
    "half precision that overflows, split": {
        "algorithm": FULL,
        "objective": Lost(1e-2, 1e-2),
        "groups": 3,
        "members": 6,
        "updates": 3,
        "scale": (2.0**24, 3),
    },
    "half precision, balanced": {
        "algorithm": FULL,
        "composition": MARBLE(every=2),
        "groups": 4,
        "members": 4,
        "scale": (2.0**12, 2000),
    },
    "taught": {"algorithm": Distill(steps=3), "groups": 3, "members": 4, "updates": 1},
    "balance": {"algorithm": TrajectoryBalance(steps=3), "groups": 3, "members": 4, "updates": 1},
}

WRITING = {
    "claims at their words": {"algorithm": ClaimDiffRL("both", kl=0.1), "reward": Claims(True, missing=0.5)},
    "words weighed by the group": {"algorithm": TWGRPO(), "reward": Claims()},
    "right and wrong texts": {"algorithm": DRPO(longest=8), "reward": Truth(), "groups": 1, "updates": 1},
    "a judge that is trusted": {
        "algorithm": TrustGRPO("claims", kl=0.0, gate=0.0, even=(0.0, 1.0)),
        "reward": Claims(),
        "groups": 1,
        "updates": 1,
    },
    "criteria that teach": {"algorithm": POW3R(), "reward": Rubric(), "groups": 1, "updates": 1},
    "sentences": {"algorithm": IGPO(gamma=0.7), "reward": Claims(True), "groups": 1, "updates": 1},
    "words alone": {"algorithm": GRPO(kl=0.1), "reward": Claims()},
}
GIVEN = {"lirefl": LIReFL(steps=3, reward_weight=1.0), "sft": SFT()}


def writing(
    scenario: str, distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    """Some iterations of a method for texts, with the groups whole or split."""
    given = WRITING[scenario]
    rewards = [given["reward"]]
    if isinstance(given["algorithm"], TrustGRPO):
        rewards.append(Truth())
    algorithm = given["algorithm"].build({reward.name: 1.0 for reward in rewards})
    policy, notes = ToyWriter(), Notes()
    settings = TrainingSettings(
        iterations, learning_rate=1e-2, batch=5, updates=given.get("updates", 2), max_missing=1.0
    )
    prompts = pictures(given.get("groups", 2), 6)
    Trainer(policy, algorithm, Scorer(rewards, 1.0), prompts, settings, distributed, notes, folder).run()
    return kept(policy, notes, distributed)


def tiny(
    pipeline: Path, distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    """Some iterations of a real pipeline with random weights, by LoRA."""
    policy, notes = small(pipeline, FAST.noise, distributed), Notes()
    prompts = PromptSource([Prompt("a red cat"), Prompt("two dogs"), Prompt("a blue hat")], 3, 4, 0)
    algorithm, scorer = FAST.build({"brightness": 1.0}), Scorer([Brightness()])
    settings = TrainingSettings(iterations, learning_rate=1e-3, batch=5, updates=1, noise_floor="warn")
    Trainer(policy, algorithm, scorer, prompts, settings, distributed, notes, folder).run()
    return kept(policy, notes, distributed)


def small(model: Path, noise: Noise, distributed: Distributed) -> FlowPolicy | CaptionPolicy:
    settings = PolicySettings(str(model), max_sequence_length=16, lora=LoraSettings(rank=4, alpha=8))
    return load(settings, noise, distributed.device)


class Length:
    """How long a text is."""

    name = "length"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, torch.tensor([[float(len(text))] for text in outcome.media]))


class OfLatents(Brightness):
    """The mean of a picture, or of a noisy latent."""

    def on_latents(self, prompts: Prompts, z: Tensor, sigma: Tensor) -> Tensor:
        return z.flatten(1).mean(1)


def given(
    method: str, pipeline: Path, distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    """Some iterations of a method whose samples the prompts bring: pictures to draw, or texts to write."""
    model, reward = (LAB / "captioner", Length()) if method == "sft" else (pipeline, OfLatents())
    algorithm = GIVEN[method].build({reward.name: 1.0})
    policy, notes = small(model, algorithm.noise, distributed), Notes()
    prompts = PromptSource(read_prompts(LAB / "captions/validation.jsonl")[:6], 6, 1, 0)
    settings = TrainingSettings(iterations, learning_rate=1e-3, batch=4, updates=1)
    Trainer(policy, algorithm, Scorer([reward]), prompts, settings, distributed, notes, folder).run()
    return kept(policy, notes, distributed)


def through(
    method: str, distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    """Some iterations of a method that differentiates through its reward, on a mixture of Gaussians."""
    algorithm = THROUGH[method].build({"value": 1.0})
    policy, notes = policy_of(TWO, algorithm.noise), Notes()
    settings = TrainingSettings(iterations, learning_rate=1e-2, batch=5, updates=2)
    scorer, prompts = Scorer([Judge(lambda x: x[:, 0])]), known_source(4, groups=4)
    Trainer(policy, algorithm, scorer, prompts, settings, distributed, notes, folder).run()
    return kept(policy, notes, distributed)


def train(
    scenario: str, distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    """Some iterations of the toy; gives the metrics, the rollouts and the weights."""
    return follow(SCENARIOS[scenario], distributed, folder, iterations)


def follow(
    given: dict[str, Any], distributed: Distributed, folder: Path | None = None, iterations: int = 3
) -> dict[str, Any]:
    rewards = [given.get("first", Redness()), given.get("reward", Brightness())]
    watched = isinstance(given["algorithm"], GARDO)
    weights = {"redness": {0: 1.0}, "brightness": {0: 0.0 if watched else 0.5}}
    composer = given["composition"].build(weights) if "composition" in given else Composer(weights)
    algorithm = composed(given["algorithm"].build(composer.shares), composer)
    algorithm = replace(algorithm, objective=given.get("objective", algorithm.objective))
    policy = ToyFlow(algorithm.noise, precision="fp16" if "scale" in given else "fp32")
    notes = Notes()
    settings = TrainingSettings(
        iterations, learning_rate=1e-3, batch=5, updates=given.get("updates", 2), max_missing=0.5
    )
    prompts, scorer = source(given["groups"], given["members"]), Scorer(rewards, 0.5)
    trainer = Trainer(
        policy, algorithm, scorer, prompts, settings, distributed, notes, folder, composer=composer
    )
    if "scale" in given:
        trainer.learner.scale = LossScale(*given["scale"])
    trainer.run()
    return kept(policy, notes, distributed)


def every(pipeline: Path) -> dict[str, Callable[..., dict[str, Any]]]:
    """All ways of training, by name; each takes processes, a folder of checkpoints and iterations."""
    found: dict[str, Callable[..., dict[str, Any]]] = {name: partial(train, name) for name in SCENARIOS}
    found |= {name: partial(through, name) for name in THROUGH}
    found |= {name: partial(writing, name) for name in WRITING}
    found |= {name: partial(given, name, pipeline) for name in GIVEN}
    return found | {"tiny": partial(tiny, pipeline)}


def kept(policy: Policy, notes: Notes, distributed: Distributed) -> dict[str, Any]:
    trained = distributed.unwrap(policy.module).named_parameters()
    return {
        "metrics": notes.metrics,
        "rows": notes.rows,
        "weights": {name: p.detach().clone() for name, p in trained if p.requires_grad},
        "average": [p.clone() for p in policy.copies.state_dict()["average"]],
    }


def gathered(distributed: Distributed) -> dict[str, Tensor]:
    """What all ranks have after gathering rows that differ in every size."""
    rank = distributed.rank
    return {
        "ragged": distributed.gather(torch.full((rank + 1, 3 - rank), 10.0 + rank, dtype=torch.float64)),
        "large": distributed.gather(torch.tensor([2**62 + rank])),
        "flags": distributed.gather(torch.tensor([rank == 0])),
        "none": distributed.gather(torch.zeros(2 * rank, 1)),
        "any": torch.tensor([distributed.any(rank == 1), distributed.any(False)]),
        "objects": torch.tensor(distributed.gather_objects([rank] * (rank + 1))),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    world, folder = Distributed("cpu"), Path(sys.argv[1])
    found: dict[str, Any] = {"gathered": gathered(world), "world": world.world, "kind": world.kind}
    found["stopped"] = {}
    for name, learn in every(Path(sys.argv[2])).items():
        found[name] = learn(world)
        learn(world, folder / name, 1)
        found["stopped"][name] = learn(world, folder / name)
    torch.save(found, folder / f"rank_{world.rank}.pt")
    world.close()
