"""The loop: exact gradients, honest health numbers, and what happens when something goes wrong."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import Brightness, Notes, Redness, ToyFlow, source

from mmalign import checkpoints
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import Policy
from mmalign.health import StaticAlarm
from mmalign.objectives import ClippedRatio
from mmalign.records import Minibatch, Outcome, Prompts, RewardSignal
from mmalign.rewardmodels.motion import Motion
from mmalign.scoring import RewardError, Scorer
from mmalign.trainer import AVERAGE, Algorithm, Trainer, TrainingError, TrainingSettings

FAST = TrainingSettings(iterations=3, learning_rate=1e-3, updates=2, batch=1000)


def trainer(
    settings: TrainingSettings = FAST,
    method: FlowGRPO | None = None,
    rewards: list[Any] | None = None,
    groups: int = 4,
    members: int = 4,
    seed: int = 0,
    **given: Any,
) -> Trainer:
    rewards = rewards or [Redness()]
    algorithm = (method or FlowGRPO(steps=4, clip=1e-2, kl=0.0)).build({r.name: 1.0 for r in rewards})
    algorithm = given.pop("change", lambda a: a)(algorithm)
    scorer = Scorer(rewards, settings.max_missing)
    policy = given.pop("policy", None) or ToyFlow(algorithm.noise, seed=seed)
    return Trainer(policy, algorithm, scorer, source(groups, members), settings, **given)


def trained(found: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in found.learner.parameters]


def gradient(found: Trainer) -> Tensor:
    found.step(0)
    return torch.cat([p.grad.flatten() for p in found.learner.parameters if p.grad is not None])


ONE = replace(FAST, updates=1, grad_clip=1e9)


# The gradient


@pytest.mark.parametrize("batch", [1, 5, 7, 48])
def test_the_size_of_minibatches_does_not_change_the_gradient(batch):
    whole = gradient(trainer(ONE, FlowGRPO(steps=4, clip=1e-2, kl=0.1)))
    parts = gradient(trainer(replace(ONE, batch=batch), FlowGRPO(steps=4, clip=1e-2, kl=0.1)))
    assert whole.norm() > 0
    assert_close(parts, whole, atol=1e-7, rtol=1e-4)


def test_the_gradient_is_that_of_the_mean_over_samples_and_actions():
    found = trainer(ONE)
    policy = found.policy
    trajectory = policy.sample(found.prompts.at(0), found.algorithm.plans(0, 0)[0], (0, "sample", 0, 0))
    score = Redness()(trajectory.outcome).values[:, 0].double().reshape(4, 4)
    wanted = ((score - score.mean(1, keepdim=True)) / (score.std(correction=0) + 1e-4)).flatten()
    every = [p for p in policy.picks(trajectory, torch.arange(16), 1000)]
    log_prob = policy.evaluate(trajectory, every[0]).log_prob
    loss = -(
        log_prob * wanted[every[0].rows].float()
    ).mean()  # at a ratio of 1 the gradient is that of A log p
    by_hand = torch.autograd.grad(loss, found.learner.parameters)
    assert_close(gradient(found), torch.cat([g.flatten() for g in by_hand]), atol=1e-6, rtol=1e-4)


def test_leaving_out_idle_samples_changes_nothing_but_the_work():
    class Coarse(Redness):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            flat = torch.tensor([int(t) % 2 == 0 for t in outcome.prompts.text])[:, None]
            return RewardSignal(self.name, torch.where(flat, 0.3, super().__call__(outcome).values))

    notes = [Notes(), Notes()]
    runs = [
        trainer(replace(FAST, skip_idle=skip), rewards=[Coarse()], tracker=note)
        for skip, note in zip((False, True), notes, strict=True)
    ]
    for run in runs:
        run.run()
    for one, two in zip(trained(runs[0]), trained(runs[1]), strict=True):
        assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert 0 < runs[1].policy.forwards.train < runs[0].policy.forwards.train
    shares = [note.metrics[0]["groups/flat_share"] for note in notes]
    assert shares[0] == shares[1] > 0


def test_a_batch_of_equal_samples_leaves_the_weights_alone():
    class Flat(Redness):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            return RewardSignal(self.name, torch.full((len(outcome.prompts), 1), 0.7))

    found = trainer(replace(FAST, weight_decay=0.0), rewards=[Flat()])
    before = trained(found)
    metrics = found.step(0)
    assert metrics["groups/flat_share"] == 1
    assert metrics["grad_norm"] == 0
    for one, two in zip(before, trained(found), strict=True):
        assert torch.equal(one, two)


def test_the_first_update_has_ratio_one_and_the_second_has_not():
    metrics = trainer(replace(FAST, learning_rate=1e-2)).step(0)
    assert metrics["noise_floor/max"] < 1e-6
    assert metrics["noise_floor/mean"] <= metrics["noise_floor/max"]
    assert metrics["ratio_max"] > 1.0001
    assert trainer(ONE).step(0)["ratio_max"] - 1 < 1e-6


def test_places_and_several_rewards_train_too():
    rewards = [Redness(), Brightness(by_place=True)]
    found = trainer(rewards=rewards, policy=ToyFlow(by_place=True), change=lambda a: replace(
        a, credit=replace(a.credit, combine="apart", reach="local")
    ))  # fmt: skip
    before = trained(found)
    found.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(found), strict=True))


# What is logged


def test_everything_of_a_healthy_run_is_logged_from_the_first_iteration():
    notes = Notes()
    trainer(
        tracker=notes, rewards=[Redness(), Brightness()], method=FlowGRPO(steps=4, clip=1e-2, kl=0.1)
    ).run()
    wanted = {
        "reward/redness", "reward/redness/std", "reward/redness/group_std", "reward/redness/missing",
        "reward/brightness", "noise_floor/mean", "noise_floor/max", "log_ratio", "log_ratio_max", "ratio",
        "ratio_max", "clip_share", "kl", "kl_max", "groups/flat_share", "grad_norm", "loss", "learning_rate",
        "seconds/sample", "seconds/reward", "seconds/credit", "seconds/update", "seconds/iteration",
        "share/sample", "share/update", "share/other", "memory/peak_bytes", "forwards/sample",
        "forwards/train", "forwards/reference", "by_step/ratio/0", "by_step/clip_share/2",
    }  # fmt: skip
    assert set(notes.metrics) == {0, 1, 2}
    for metrics in notes.metrics.values():
        assert wanted <= metrics.keys()
        assert sum(v for k, v in metrics.items() if k.startswith("share/")) == pytest.approx(1, abs=1e-6)
    assert notes.metrics[0]["memory/peak_bytes"] > 1e7


def test_a_rollout_row_tells_all_about_a_sample():
    notes = Notes()
    trainer(tracker=notes, rewards=[Redness(), Brightness(by_place=True)]).run()
    rows = notes.rows[1]
    assert len(rows) == 16
    row = rows[0]
    assert set(row["rewards"]) == {"redness", "brightness"}  # type: ignore[call-overload]
    assert isinstance(row["rewards"]["redness"], float)  # type: ignore[index]
    assert len(row["rewards"]["brightness"]) == 4  # type: ignore[index]
    assert row["key"] == [0, "sample", 1, 0]
    assert row["counted"] is True
    assert row["forwards"] == 4
    assert sum(r["advantage"] for r in rows) == pytest.approx(0, abs=1e-4)  # type: ignore[misc]
    assert row["details"]["redness"][0]["word"] == "x"  # type: ignore[index]


def test_equal_seeds_give_equal_runs_and_others_do_not():
    runs = [Notes(), Notes(), Notes()]
    for notes, seed in zip(runs, (0, 0, 1), strict=True):
        trainer(replace(FAST, seed=seed), tracker=notes).run()
    scores = [[m["reward/redness"] for m in notes.metrics.values()] for notes in runs]
    assert scores[0] == scores[1] != scores[2]


# The static alarm


class Filmed:
    """The reward `motion` on clips in which a square moves until an iteration, and stands still from then."""

    name = "motion"

    def __init__(self, until: int) -> None:
        self.until, self.iteration = until, 0

    def __call__(self, outcome: Outcome) -> RewardSignal:
        count = len(outcome.prompts)
        clips = torch.full((count, 4, 3, 16, 16), 0.9)
        for row, frame in product(range(count), range(4)):
            left = 3 if self.iteration >= self.until else 3 + 2 * frame
            clips[row, frame, :, 5:11, left : left + 5] = 0.1
        self.iteration += 1
        return Motion()(replace(outcome, media=clips))


def filmed(until: int, iterations: int = 10, **given: Any) -> Trainer:
    settings = replace(FAST, iterations=iterations, updates=1)
    return trainer(settings, rewards=[Filmed(until)], groups=2, members=2, **given)


def test_a_run_whose_clips_freeze_rings_the_alarm_once():
    notes = Notes()
    with pytest.warns(RuntimeWarning, match="reward/motion/static: 20% of the videos") as said:
        filmed(until=6, tracker=notes).run()
    assert len(said) == 1
    assert [notes.metrics[i]["reward/motion/static"] for i in range(10)] == [0.0] * 6 + [1.0] * 4
    assert [notes.metrics[i]["health/static_alarm"] for i in range(10)] == [0.0] * 6 + [1.0] * 4


@pytest.mark.parametrize(("until", "why"), [(99, "they move"), (0, "they never did")])
def test_a_run_whose_clips_move_or_never_did_does_not(until, why, recwarn):
    notes = Notes()
    filmed(until, tracker=notes, iterations=7).run()
    assert {m["health/static_alarm"] for m in notes.metrics.values()} == {0.0}, why
    assert not [w for w in recwarn if "stand still" in str(w.message)]


def test_the_alarm_rings_above_a_rise_of_a_tenth(recwarn):
    alarm = StaticAlarm()
    for share in (0.1, 0.3, 0.2, 0.2, 0.2):  # 0.2 in the mean
        assert alarm({"reward/a/static": share, "heldout/static": 1.0}) == {"health/static_alarm": 0.0}
    assert [alarm({"reward/a/static": 0.29})["health/static_alarm"] for _ in range(9)] == [0.0] * 9
    assert [alarm({"reward/a/static": 0.32})["health/static_alarm"] for _ in range(5)] == [0, 1, 1, 1, 1]
    assert alarm({"reward/a/static": 0.0})["health/static_alarm"] == 0  # 0.256 over five iterations
    assert alarm({"reward/a": 0.0}) == {}
    assert len([w for w in recwarn if "stand still" in str(w.message)]) == 1


def test_the_alarm_goes_on_over_a_resume(tmp_path):
    with pytest.warns(RuntimeWarning, match="stand still"):
        filmed(until=6, iterations=7, run_dir=tmp_path).run()
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filmed(until=0, iterations=9, run_dir=tmp_path, tracker=notes).run()
    assert [notes.metrics[i]["health/static_alarm"] for i in (7, 8)] == [1.0, 1.0]
    quiet = tmp_path / "quiet"
    filmed(until=99, iterations=6, run_dir=quiet).run()
    with pytest.warns(RuntimeWarning, match="stand still"):  # the first iterations are those before it
        filmed(until=0, iterations=7, run_dir=quiet).run()


# The trust region and rounding


def rounded(policy: Policy, batch: Minibatch) -> Any:
    """The clipped ratio of a policy whose replay is off by about 1e-3."""
    noise = 1e-3 * torch.randn(batch.log_prob.shape, generator=torch.Generator().manual_seed(0))
    trajectory = replace(batch.trajectory, log_prob=batch.trajectory.log_prob.clone())
    trajectory.log_prob[batch.pick.rows, batch.pick.columns] += noise
    return ClippedRatio(1e-3, 1e-3)(policy, replace(batch, trajectory=trajectory))


class Rounded(ClippedRatio):
    def __call__(self, policy: Policy, batch: Minibatch) -> Any:
        return rounded(policy, batch)


def test_a_clip_range_inside_the_noise_floor_is_refused():
    def change(a: Algorithm) -> Algorithm:
        return replace(a, objective=Rounded(1e-3, 1e-3))

    found = trainer(change=change)
    before = trained(found)
    with pytest.raises(TrainingError, match=r"clip range is only 0.001.*Raise the clip to 0.002"):
        found.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trained(found), strict=True))
    with pytest.warns(RuntimeWarning, match="noise floor"):
        trainer(replace(FAST, noise_floor="warn"), change=change).run()
    trainer(change=lambda a: replace(a, objective=Rounded(1e-2, 1e-2))).run()


# When something goes wrong


class Sick(ClippedRatio):
    """Its loss, or the gradient of a finite loss, is NaN in the calls that are named."""

    calls: list[int] = []  # noqa: RUF012
    bad: set[int] = set()  # noqa: RUF012
    part = "loss"

    def __call__(self, policy: Policy, batch: Minibatch) -> Any:
        losses, measures = super().__call__(policy, batch)
        self.calls.append(0)
        if len(self.calls) - 1 in self.bad:
            losses = losses * torch.nan if self.part == "loss" else losses + (0 * losses).abs().sqrt()
        return losses, measures


@pytest.fixture(params=["loss", "gradient"])
def sick(request):
    def make(bad: set[int]) -> Any:
        Sick.calls, Sick.bad, Sick.part = [], bad, request.param
        return lambda a: replace(a, objective=Sick(1e-2, 1e-2))

    return make


def test_an_update_with_nan_is_skipped_and_counted(sick):
    notes = Notes()
    found = trainer(change=sick({1}), tracker=notes)  # two updates an iteration, one minibatch each
    found.run()
    assert notes.metrics[2]["updates"] == 5
    assert notes.metrics[2]["updates/bad"] == 1
    assert all(p.isfinite().all() for p in trained(found))


def test_a_bad_update_leaves_no_trace_in_weights_average_and_optimizer(sick):
    found = trainer(replace(FAST, updates=1, iterations=1), change=sick({0}))
    before, average = trained(found), [p.clone() for p in found.policy.copies.state_dict()[AVERAGE]]
    found.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trained(found), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(average, found.policy.copies.state_dict()[AVERAGE], strict=True)
    )
    assert not found.learner.optimizer.state_dict()["state"]


def test_too_many_bad_updates_in_a_row_stop_the_run_with_a_diagnosis(sick):
    found = trainer(replace(FAST, iterations=9, max_bad_steps=3), change=sick({1, 3, 4, 5}))
    with pytest.raises(
        TrainingError, match=r"3 updates in a row .* gradient norm nan, .* ratio mean 1.*learning_rate"
    ) as said:
        found.run()
    assert ("loss nan" in str(said.value)) == (Sick.part == "loss")
    assert (found.learner.bad, found.learner.updates) == (4, 2)  # the first was not followed by another


class Broken(Redness):
    """Has no verdict on the samples of some prompts and raises for others."""

    def __init__(self, nan: tuple[str, ...] = (), dead: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.nan, self.dead = nan, dead

    def __call__(self, outcome: Outcome) -> RewardSignal:
        if any(t in self.dead for t in outcome.prompts.text):
            raise ConnectionError("judge is away")
        silent = torch.tensor([t in self.nan for t in outcome.prompts.text])[:, None]
        return RewardSignal(self.name, torch.where(silent, torch.nan, super().__call__(outcome).values))


@pytest.mark.parametrize("how", [{"nan": ("1", "2")}, {"dead": ("1", "2")}])
@pytest.mark.filterwarnings("ignore:reward 'redness'")
def test_a_reward_that_fails_on_some_samples_costs_only_them(how):
    notes = Notes()
    found = trainer(replace(FAST, max_missing=0.6, iterations=2), rewards=[Broken(**how)], tracker=notes)
    found.run()
    metrics = notes.metrics
    assert {m["reward/redness/missing"] for m in metrics.values()} <= {0.0, 0.25, 0.5}
    assert sum(m["reward/redness/missing"] for m in metrics.values()) == 0.5  # 8 prompts, 4 an iteration
    assert all(m["samples/counted_share"] == 1 - m["reward/redness/missing"] for m in metrics.values())
    silent = [r for rows in notes.rows.values() for r in rows if r["prompt"] in ("1", "2")]
    assert all(r["rewards"]["redness"] is None and r["advantage"] == 0 and not r["counted"] for r in silent)  # type: ignore[index]
    assert all(p.isfinite().all() for p in trained(found))


def test_a_reward_that_mostly_fails_stops_the_run_before_it_learns():
    found = trainer(rewards=[Broken(nan=tuple("01234567"))])
    with pytest.raises(RewardError, match="no verdict for 100%"):
        found.run()
    assert found.learner.updates == 0


def test_pictures_that_are_nan_do_not_reach_the_gradient():
    class Blown(ToyFlow):
        def sample(self, prompts, plan, key):
            found = super().sample(prompts, plan, key)
            for values in (found.outcome.media, found.log_prob, found.replay["x"], found.replay["x_next"]):
                values[3] = torch.nan
            return found

    found = trainer(replace(FAST, iterations=2), policy=Blown())
    with pytest.warns(RuntimeWarning, match="not finite"):
        found.run()
    assert found.learner.updates == 4
    assert all(p.isfinite().all() for p in trained(found))


# Averages


def test_the_average_moves_once_per_update_and_is_no_alias():
    found = trainer(replace(FAST, ema_decay=0.5, ema_every=2, iterations=1, updates=4, batch=3))
    average = found.policy.copies.state_dict()[AVERAGE]
    live = dict(zip(map(id, average), found.learner.parameters, strict=True))
    assert all(a.data_ptr() != p.data_ptr() for a, p in ((a, live[id(a)]) for a in average))
    expected, seen = [p.clone() for p in average], []
    step = found.learner.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        seen.append(trained(found))

    found.learner.optimizer.step = spy  # type: ignore[method-assign]
    found.run()
    assert len(seen) == 4
    for moves, weights in enumerate(seen[1::2], 1):
        keep = min(0.5, (1 + moves) / (10 + moves))
        expected = [keep * a + (1 - keep) * w for a, w in zip(expected, weights, strict=True)]
    for a, b in zip(expected, average, strict=True):
        assert_close(b, a, atol=1e-6, rtol=1e-5)
    before = trained(found)
    with found.policy.copies.use(AVERAGE):
        assert any(not torch.equal(a, b) for a, b in zip(before, trained(found), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, trained(found), strict=True))


def test_the_reference_never_moves():
    found = trainer(method=FlowGRPO(steps=4, clip=1e-2, kl=0.1))
    before = trained(found)
    found.run()
    assert all(
        torch.equal(a, b) for a, b in zip(before, found.policy.copies.state_dict()["reference"], strict=True)
    )
    assert found.policy.forwards.reference == found.policy.forwards.train


# Rewards that learn, evaluation, signals, refusals


class Learned(Redness):
    def __init__(self) -> None:
        super().__init__("learned")
        self.seen = 0

    def fit(self, outcome: Outcome) -> dict[str, float]:
        self.seen += len(outcome.prompts)
        return {"seen": float(self.seen)}

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert isinstance(state["seen"], int)
        self.seen = state["seen"]


def test_a_reward_that_learns_is_fitted_after_each_update():
    notes = Notes()
    trainer(rewards=[Learned()], tracker=notes).run()
    assert [m["reward/learned/fit/seen"] for m in notes.metrics.values()] == [16, 32, 48]


def test_samples_are_judged_before_they_are_learned_from():
    events = []

    class Ordered(Learned):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            events.append("judged")
            return super().__call__(outcome)

        def fit(self, outcome: Outcome) -> dict[str, float]:
            events.append("learned from")
            return super().fit(outcome)

    found = trainer(rewards=[Ordered()])
    found.run()
    assert events == ["judged", "learned from"] * found.settings.iterations


def test_evaluation_is_asked_after_each_iteration_and_its_numbers_are_logged():
    notes, asked = Notes(), []

    def evaluate(iterations: int) -> dict[str, float]:
        asked.append(iterations)
        return {"heldout/x": 1.0} if iterations == 2 else {}

    trainer(tracker=notes, evaluate=evaluate).run()
    assert asked == [1, 2, 3]
    assert ["heldout/x" in m for m in notes.metrics.values()] == [False, True, False]


def test_a_polite_end_leaves_a_checkpoint_and_the_signal_as_it_was(tmp_path):
    def evaluate(iterations: int) -> dict[str, float]:
        if iterations == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    found = trainer(replace(FAST, iterations=50), run_dir=tmp_path, evaluate=evaluate)
    found.run()
    assert found.iteration == 2
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step_000002"
    assert signal.getsignal(signal.SIGTERM) is before


def test_warm_up_raises_the_learning_rate():
    notes = Notes()
    trainer(replace(FAST, warmup=4, learning_rate=4e-3), tracker=notes).run()
    assert [m["learning_rate"] for m in notes.metrics.values()] == pytest.approx([3e-3, 4e-3, 4e-3])


def test_decay_lowers_the_learning_rate_to_nothing_at_the_end():
    notes = Notes()
    settings = replace(FAST, iterations=6, decay=0.5, learning_rate=4e-3)
    trainer(settings, tracker=notes).run()
    expected = [4e-3, 4e-3, 4e-3, 4e-3, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [m["learning_rate"] for m in notes.metrics.values()] == pytest.approx(expected)


def test_what_cannot_be_trained_is_refused_before_any_sampling():
    class Alone:
        def at(self, iteration: int, rank: int = 0, world: int = 1) -> Prompts:
            return Prompts(["0", "1"], torch.tensor([0, 1]), torch.tensor([0, 0]), [{}, {}])

    with pytest.raises(ValueError, match="group of one"):
        Trainer(ToyFlow(), FlowGRPO().build({"r": 1.0}), Scorer([Redness()]), Alone(), FAST)
    with pytest.raises(ValueError, match="updates=3 must divide the 4 groups"):
        trainer(replace(FAST, updates=3))
    frozen = ToyFlow()
    frozen.module.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable"):
        trainer(policy=frozen)
    half = ToyFlow()
    half.module.to(torch.bfloat16)
    with pytest.raises(ValueError, match="fp32"):
        trainer(policy=half)


@pytest.mark.parametrize(
    "wrong",
    [{"iterations": 0}, {"updates": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"max_missing": 20},
     {"warmup": -1}, {"grad_clip": 0}, {"decay": 1.5}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"got|between"):
        TrainingSettings(**wrong)


def test_checkpoints_hold_the_policy_and_its_average(tmp_path: Path):
    trainer(run_dir=tmp_path).run()
    folder = checkpoints.latest(tmp_path)
    assert folder is not None
    assert (folder / "toy.pt").is_file()
    assert (folder / AVERAGE / "toy.pt").is_file()
