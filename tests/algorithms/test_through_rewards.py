"""ReFL, DRaFT and SRPO: gradients against autograd and differences, costs, restarts, and that they learn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from known import TWO, Judge, policy_of, source
from torch import Tensor
from torch.testing import assert_close
from toys import Notes, initial

from mmalign.algorithms.draft import DRaFT
from mmalign.algorithms.refl import OneStep, ReFL
from mmalign.algorithms.srpo import SRPO, DirectAlign, recovered
from mmalign.gradients import Differentiated
from mmalign.lab.gaussians import points
from mmalign.records import Halted, Minibatch, Outcome, Pick, Plan, RewardSignal
from mmalign.scoring import Scorer
from mmalign.testing import prompts_of
from mmalign.trainer import Trainer, TrainingSettings

KEY = (0, "test")
METHODS = [
    ReFL(steps=6),
    DRaFT(steps=6),
    DRaFT(steps=6, last=3),
    DRaFT(steps=6, last=3, spread=1.0),
    DRaFT(steps=6, noises=2),
    SRPO(steps=6, margin=9.0),
    SRPO(steps=6, margin=9.0, invert=False),
]
NAMES = ["ReFL", "DRaFT-1", "DRaFT-3", "AlignProp", "DRaFT-LV", "SRPO", "Direct-Align"]
RIGHT = Judge(lambda x: x[:, 0])  # the further to the right the better


def run(
    method, iterations: int = 1, run_dir: Path | None = None, reward=RIGHT, **settings
) -> tuple[Trainer, Notes]:
    notes, algorithm = Notes(), method.build({"value": 1.0})
    given = {"learning_rate": 0.05, "batch": 1000, "updates": 1, "weight_decay": 0.0} | settings
    found = Trainer(
        policy_of(TWO, algorithm.noise),
        algorithm,
        Scorer([reward]),
        source(4, groups=2),
        TrainingSettings(iterations=iterations, **given),
        tracker=notes,
        run_dir=run_dir,
    )
    found.run()
    return found, notes


def weights(found: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in found.learner.parameters]


def gradient(
    method, plan: Plan | None = None, change=lambda trajectory: trajectory, members: int = 8, key=KEY
):
    """The gradient of a method's loss over one group, by the policy's parameters; the samples; the policy."""
    algorithm = method.build({"value": 1.0})
    algorithm.through.meet([RIGHT])
    policy = policy_of(TWO, algorithm.noise)
    plan = plan or algorithm.plans(0, 0)[0]
    trajectory = change(policy.sample(prompts_of(["a"], members), plan, KEY))
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    batch = Minibatch(trajectory, pick, torch.zeros(1, len(pick)), torch.full((len(pick),), 1 / len(pick)))
    losses, _ = algorithm.objective(policy, batch)
    parameters = [policy.module.mean, policy.module.log_variance, policy.module.logit]
    found = torch.autograd.grad(losses.sum(), parameters)
    return torch.cat([g.flatten() for g in found]), trajectory, policy


def by_hand(policy, trajectory, steps: int, last: int) -> Tensor:
    """Gradient of minus the mean reward through a naive loop; before the last steps its state is constant."""
    x = initial(trajectory.outcome.prompts, policy.shape, KEY).flatten(1)
    times = torch.linspace(1, 0, steps + 1)
    for i in range(steps):
        x = x.detach() if i == steps - last else x
        x = x + (times[i + 1] - times[i]) * policy.module(x, times[i].expand(len(x)))
    parameters = [policy.module.mean, policy.module.log_variance, policy.module.logit]
    return torch.cat([g.flatten() for g in torch.autograd.grad(-x[:, 0].mean(), parameters)])


# ---- all of them


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_forwards_are_those_of_the_formula(method):
    found, _ = run(method, batch=3)
    counts, plan = found.policy.forwards, found.algorithm.plans(0, 0)[0]
    per_sample = {ReFL: lambda: 1, DRaFT: lambda: max(plan.halt, method.noises if method.noises else 0),
                  SRPO: lambda: 2 if method.invert else 1}[type(method)]()  # fmt: skip
    assert (counts.sample, counts.train, counts.reference) == (8 * 6, 8 * per_sample, 0)
    assert plan.noises * found.algorithm.through.cost(plan) == per_sample


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_the_reward_rises(method):
    def score(policy) -> float:
        return float(points(policy.images(prompts_of(["a"], 32), 6, KEY)).mean())

    assert score(run(method, iterations=12)[0].policy) > score(policy_of(TWO)) + 0.2


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_the_size_of_minibatches_does_not_change_the_gradient(method):
    found = [run(method, batch=batch, grad_clip=1e9)[0] for batch in (3, 1000)]
    grads = [torch.cat([p.grad.flatten() for p in one.learner.parameters]) for one in found]
    assert grads[0].norm() > 0
    assert_close(*grads, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3], METHODS[5]], ids=["ReFL", "AlignProp", "SRPO"])
def test_a_resumed_run_ends_as_one_that_ran_through(method, tmp_path):
    through = weights(run(method, iterations=4)[0])
    run(method, iterations=2, run_dir=tmp_path)
    again = run(method, iterations=4, run_dir=tmp_path)[0]
    assert again.policy.forwards.sample == 4 * 8 * 6
    assert all(map(torch.equal, weights(again), through))


def test_a_reward_of_weight_zero_is_watched_and_needs_no_gradient():
    algorithm = DRaFT(steps=3).build({"value": 1.0, "other": 0.0})

    @dataclass
    class Blind:
        name: str = "other"

        def __call__(self, outcome: Outcome) -> RewardSignal:
            return RewardSignal(self.name, -points(outcome.media)[:, :1])

    notes = Notes()
    settings = TrainingSettings(iterations=1, learning_rate=0.05, updates=1)
    Trainer(policy_of(TWO), algorithm, Scorer([RIGHT, Blind()]), source(4), settings, tracker=notes).run()
    assert notes.metrics[0]["reward/other"] == pytest.approx(-notes.metrics[0]["reward/value"], abs=1e-5)


# ---- ReFL


def test_refl_halts_uniformly_over_its_range():
    plans = ReFL(steps=40).build({"r": 1.0}).plans
    halts = Counter(40 - plans(i, 0)[0].halt for i in range(2000))
    assert set(halts) == set(range(30, 40))
    assert all(abs(count - 200) < 5 * 200**0.5 for count in halts.values())


def test_refl_differentiates_the_clean_sample_that_is_predicted():
    method = ReFL(steps=6, scale=1.0)
    found, trajectory, policy = gradient(method)
    at = policy.halted(trajectory, Pick(torch.arange(8), torch.zeros(8, dtype=torch.int64)))
    x, sigma = at.x.flatten(1), at.path[0]
    clean = x - sigma * policy.module(x, sigma.expand(8))
    exact = torch.autograd.grad(
        (2 - clean[:, 0]).relu().mean(), [policy.module.mean, policy.module.log_variance, policy.module.logit]
    )
    assert_close(found, torch.cat([g.flatten() for g in exact]), atol=1e-5, rtol=1e-4)


def test_beyond_the_margin_refl_asks_for_nothing_more():
    satisfied = gradient(ReFL(steps=6, margin=-100.0))[0]
    assert not satisfied.any()
    assert gradient(ReFL(steps=6, margin=100.0))[0].any()


def test_refl_and_draft_1_are_one_at_the_last_step():
    draft, _, _ = gradient(DRaFT(steps=6))
    refl, _, _ = gradient(ReFL(steps=6, margin=100.0, scale=1.0), Plan(6, halt=1))
    assert_close(refl, draft, atol=1e-6, rtol=1e-4)


# ---- DRaFT


@pytest.mark.parametrize("last", [1, 2, 5])
def test_truncation_is_autograd_with_a_constant_state(last):
    found, trajectory, policy = gradient(DRaFT(steps=5, last=last))
    assert_close(found, by_hand(policy, trajectory, 5, last), atol=1e-5, rtol=1e-3)


def test_the_full_gradient_is_that_of_differences():
    found, trajectory, policy = gradient(DRaFT(steps=4, last=4))

    def value() -> float:
        return float(policy.images(trajectory.outcome.prompts, 4, KEY).flatten().double().mean() - 0.5) * 32

    size, differences = 0.02, []
    with torch.no_grad():
        for p in (policy.module.mean, policy.module.log_variance):
            for place in range(p.numel()):
                ends = []
                for move in (size, -2 * size):
                    p.view(-1)[place] += move
                    ends.append(value())
                p.view(-1)[place] += size
                differences.append(-(ends[0] - ends[1]) / (2 * size))
    assert_close(found[:4], torch.tensor(differences), atol=5e-3, rtol=0.02)


@pytest.mark.parametrize("last", [1, 3])
def test_checkpointing_does_not_change_the_gradient(last):
    plain, trajectory, policy = gradient(DRaFT(steps=5, last=last))
    algorithm = DRaFT(steps=5, last=last).build({"value": 1.0})
    algorithm.through.meet([RIGHT])
    policy.settings = replace(policy.settings, gradient_checkpointing=True)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    losses, _ = algorithm.objective(
        policy, Minibatch(trajectory, pick, torch.zeros(1, 8), torch.full((8,), 1 / 8))
    )
    parameters = [policy.module.mean, policy.module.log_variance, policy.module.logit]
    found = torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])
    assert_close(found, plain, atol=1e-6, rtol=1e-5)


def kept(steps: int, last: int, checkpointing: bool = False) -> int:
    """How many numbers the graph of one loss holds on to."""
    algorithm = DRaFT(steps=steps, last=last).build({"value": 1.0})
    algorithm.through.meet([RIGHT])
    policy, sizes = policy_of(TWO), []
    policy.settings = replace(policy.settings, gradient_checkpointing=checkpointing)
    trajectory = policy.sample(prompts_of(["a"], 4), algorithm.plans(0, 0)[0], KEY)
    pick = Pick(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        algorithm.objective(policy, Minibatch(trajectory, pick, torch.zeros(1, 4), torch.ones(4)))
    return sum(sizes)


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_steps_before():
    assert kept(4, 2) == kept(12, 2)
    assert kept(12, 8) > 2 * kept(12, 2)


def test_with_checkpointing_hardly_anything_is_kept_of_a_step():
    assert kept(12, 8, checkpointing=True) < kept(12, 8) / 4


def test_a_fresh_noise_that_is_the_old_one_gives_the_gradient_of_draft_1():
    plain, trajectory, policy = gradient(DRaFT(steps=5))
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    at = policy.halted(trajectory, pick)
    sigma = at.path[0]
    with torch.no_grad():
        noise = at.x + (1 - sigma) * policy.velocity(trajectory, pick, at.x, sigma)

    def known(fresh):
        return replace(fresh, replay={**fresh.replay, "noise": noise[:, None]})

    assert_close(gradient(DRaFT(steps=5, noises=1), change=known)[0], plain, atol=1e-5, rtol=1e-4)


def test_more_fresh_noises_give_a_gradient_of_less_variance():
    def variance(noises: int) -> float:
        """Of the gradient for one finished sample over fresh noises."""
        found = []
        for seed in range(40):
            draw = torch.Generator().manual_seed(seed)
            fresh = torch.randn(4, noises, 1, 1, 1, generator=draw)
            found.append(
                gradient(
                    DRaFT(steps=4, noises=noises),
                    change=lambda t, fresh=fresh: replace(t, replay={**t.replay, "noise": fresh}),
                    members=4,
                )[0]
            )
        return float(torch.stack(found).var(0).sum())

    assert variance(8) < variance(1) / 4


def test_alignprop_draws_the_number_of_steps_anew():
    plans = DRaFT(steps=50, last=8, spread=5.0).build({"r": 1.0}).plans
    halts = torch.tensor([float(plans(i, 0)[0].halt) for i in range(1000)])
    assert halts.min() >= 1
    assert halts.max() <= 50
    assert halts.mean() == pytest.approx(8, abs=0.6)
    assert halts.std() == pytest.approx(5, abs=0.8)
    assert [plans(i, 0) for i in range(5)] == [plans(i, 0) for i in range(5)]


# ---- SRPO


class Perfect:
    """Knows the noise and the data of what it is asked about."""

    def __init__(self, at: Halted) -> None:
        self.at, self.calls = at, 0
        self.live = torch.ones((), requires_grad=True)

    def velocity(self, trajectory, pick, x, sigma):
        self.calls += 1
        return (self.at.noise - self.at.clean) * self.live


@pytest.mark.parametrize(("here", "there"), [(0.99, 0.89), (0.89, 0.99), (0.3, 0.2), (0.2, 0.3), (0.1, 0.0)])
def test_with_the_exact_velocity_both_branches_give_the_sample_back(here, there):
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    at = Halted(clean, torch.tensor([here, 0.0]), clean, noise)
    model = Perfect(at)
    batch = Minibatch(None, None, torch.zeros(1, 3), torch.ones(3))  # type: ignore[arg-type]
    found = recovered(model, batch, at, torch.tensor(here), torch.tensor(there))  # type: ignore[arg-type]
    assert_close(found, clean, atol=1e-5 / (1 - max(here, there)), rtol=1e-5)
    assert model.calls == 1
    still = recovered(model, batch, at, torch.tensor(here), torch.tensor(here))  # type: ignore[arg-type]
    assert_close(still, clean, atol=1e-5 / (1 - here), rtol=1e-5)
    assert not torch.autograd.grad(still.sum(), model.live)[0].any()


class Taste(Judge):
    """Likes the right if told "good", the left if told "bad", and is bright whatever it is told."""

    def differentiate(self, outcome: Outcome) -> Tensor:
        x = points(outcome.media)[:, 0]
        sign = torch.tensor([("good" in text) - float("bad" in text) for text in outcome.prompts.text])
        return 5.0 + sign * x


def asked(objective: DirectAlign) -> tuple[Tensor, Tensor]:
    """The wanted and the unwanted part of the reward of three samples."""
    policy = policy_of(TWO)
    trajectory = policy.sample(prompts_of(["a"], 3), Plan(4, halt=2), KEY)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    batch = Minibatch(trajectory, pick, torch.zeros(1, 3), torch.ones(3))
    return objective.asked(policy, batch, policy.halted(trajectory, pick).clean)


def tasted(**settings) -> DirectAlign:
    reward = Differentiated({"value": 1.0}, cost=lambda plan: 1)
    reward.meet([Taste(lambda x: x[:, 0])])
    return DirectAlign(reward, **settings)


def relative(wanted: str, unwanted: str) -> Tensor:
    liked, disliked = asked(tasted(wanted=wanted, unwanted=unwanted))
    return liked - disliked


def test_the_relative_reward_turns_over_with_its_words_and_forgets_what_both_share():
    one, other = relative("good", "bad"), relative("bad", "good")
    assert_close(one, -other)
    assert one.abs().min() > 0
    assert_close(relative("good", "plain") + relative("plain", "good"), torch.zeros(3))
    assert (relative("", "") > 4).all()  # plain Direct-Align: the reward itself


def test_the_boosted_form_is_the_formula_in_both_branches():
    """With a velocity that gives the sample back, both branches judge the same picture."""
    words = {"wanted": "good", "unwanted": "bad", "margin": 50.0}
    policy = policy_of(TWO)
    trajectory = policy.sample(prompts_of(["a"], 3), Plan(4, halt=2), KEY)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    batch = Minibatch(trajectory, pick, torch.zeros(1, 3), torch.full((3,), 1 / 3))
    at = policy.halted(trajectory, pick)
    policy.velocity = lambda trajectory, pick, x, sigma: at.noise - at.clean
    liked, disliked = asked(tasted(**words))
    sigma = float(at.path[0])
    k, k_inverted = 0.1 * sigma + 0.25 * (1 - sigma), 0.3 * sigma + 0.01 * (1 - sigma)
    boosted = tasted(**words, boost=(0.1, 0.25), boost_inverted=(0.3, 0.01))
    expected = (50 - (1 + k) * liked + disliked) + (50 - (1 + k_inverted) * disliked + liked)
    assert_close(boosted(policy, batch)[0], expected.mean()[None], rtol=1e-4, atol=1e-4)
    assert_close(tasted(**words)(policy, batch)[0], torch.tensor([100.0]), rtol=1e-5, atol=1e-3)


def test_both_branches_move_the_velocity_the_same_way():
    method = SRPO(steps=6, margin=100.0)
    both, _, _ = gradient(method)
    denoise, _, _ = gradient(replace(method, invert=False))
    assert torch.cosine_similarity(denoise, both - denoise, dim=0) > 0.5


def test_srpo_stays_away_from_pure_noise_and_from_the_end():
    plans = SRPO(steps=25).build({"r": 1.0}).plans
    levels = {25 - plans(i, 0)[0].halt for i in range(300)}
    assert levels == set(range(2, 16))
    assert {10 - SRPO(steps=10, first=0.01).build({"r": 1.0}).plans(i, 0)[0].halt for i in range(200)} >= {
        1,
        6,
    }


# ---- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReFL(first=0.9, last=0.5), r"first and last must rise within \[0, 1\)"),
        (lambda: ReFL(scale=0.0), "scale must be positive"),
        (lambda: DRaFT(last=0), r"last must lie in 1\.\.10"),
        (lambda: DRaFT(last=11), r"last must lie in 1\.\.10"),
        (lambda: DRaFT(last=2, noises=2), "noises go with the last step alone"),
        (lambda: DRaFT(spread=-1.0), "must not be negative"),
        (lambda: SRPO(first=0.0), r"first and last must rise within \(0, 1\)"),
        (lambda: SRPO(stride=0.0), r"stride must lie in \(0, 1\)"),
        (lambda: SRPO(wanted="real", unwanted="real"), "nothing would be left to learn"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_objectives_have_no_ratio():
    for method in METHODS:
        assert method.build({"r": 1.0}).objective.clip_range is None
    assert OneStep(Differentiated({}, cost=lambda plan: 1)).margin == 2.0
