"""Supervised fine-tuning: cross-entropy of the references, by the loop of every other method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT
from torch.nn import functional as F
from torch.testing import assert_close

from mmalign.algorithms.sft import SFT
from mmalign.checkpoints import begin
from mmalign.cli import main
from mmalign.contracts import LoraSettings, PolicySettings, TextSettings
from mmalign.data import Prompt, PromptSource, read_prompts
from mmalign.pipelines import load
from mmalign.pipelines.captioner import CaptionPolicy, by_length
from mmalign.records import Outcome, Plan, Prompts, RewardSignal, Trajectory
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

LAB = ROOT / "assets/lab/captioner"
GIVEN = Plan(1, given=True)


def policy_of(**settings: Any) -> CaptionPolicy:
    given = {"lora": LoraSettings(rank=4, alpha=8), "text": TextSettings(max_tokens=96)} | settings
    policy = load(PolicySettings(str(LAB), **given), Noise())
    assert isinstance(policy, CaptionPolicy)
    return policy


def taught(count: int = 6) -> list[Prompt]:
    return read_prompts(ROOT / "assets/lab/captions/validation.jsonl")[:count]


def asked(prompts: list[Prompt]) -> Prompts:
    number = torch.arange(len(prompts))
    return Prompts([p.text for p in prompts], number, torch.zeros_like(number), [p.extra for p in prompts])


class Length:
    name = "length"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, torch.tensor([[float(len(text))] for text in outcome.media]))


def trainer(method: SFT, policy: CaptionPolicy, run_dir: Path | None = None, **settings: Any) -> Trainer:
    usual = TrainingSettings(iterations=1, updates=1, learning_rate=1e-2, ema_decay=0, batch=4)
    return Trainer(
        policy,
        method.build({"length": 1.0}),
        Scorer([Length()]),
        PromptSource(taught(), 6, 1, 0),
        replace(usual, **settings),
        run_dir=run_dir,
    )


def surprise(policy: CaptionPolicy, prompt: Prompt) -> torch.Tensor:
    """Minus the log-probability of each token of the reference, by one plain forward of the model."""
    inputs = dict(policy._inputs(prompt.text, str(prompt.extra["image"])))
    tokenizer = policy.adapter.tokenizer
    text = tokenizer(prompt.extra["reference"] + "<end>", add_special_tokens=False)["input_ids"]
    read = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([text])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = policy.module(**inputs).logits[0, read - 1 : -1]
    logits = logits.index_fill(1, torch.tensor(list(policy.adapter.banned)), -torch.inf)
    return F.cross_entropy(logits, torch.tensor(text), reduction="none")


@pytest.mark.parametrize("length", ["token", "text"])
def test_loss_and_gradient_are_those_of_cross_entropy(length):
    policy, plain = policy_of(), policy_of()
    teacher = trainer(SFT(length), policy, learning_rate=1e-9)
    metrics = teacher.step(0)
    losses = [surprise(plain, prompt) for prompt in taught()]
    wanted = torch.cat(losses).mean() if length == "token" else torch.stack([s.mean() for s in losses]).mean()
    assert metrics["loss"] == pytest.approx(float(wanted), abs=1e-5)
    assert metrics["token_loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    wanted.backward()
    for (name, mine), other in zip(policy.module.named_parameters(), plain.module.parameters(), strict=True):
        if other.grad is not None:
            assert mine.grad is not None
            clip = min(1.0, 1.0 / metrics["grad_norm"])
            assert_close(mine.grad, other.grad * clip, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("length", "wanted"), [("token", [1 / 7, 1 / 7, 1 / 5]), ("text", [1 / 10, 1 / 4, 1 / 5])]
)
def test_weights_sum_to_one_over_each_update_whatever_the_rewards_say(length, wanted):
    """Texts of 5 and 2 tokens in one update, one of 5 in another; no reward has a verdict."""
    mask = torch.arange(5) < torch.tensor([5, 2, 5])[:, None]
    prompts = Prompts(["x"] * 3, torch.arange(3), torch.zeros(3).long(), [{}] * 3)
    trajectory = Trajectory(Outcome(prompts, ["x"] * 3), torch.zeros(3, 5), mask, {}, GIVEN)
    nothing = RewardSignal("length", torch.full((3, 1), torch.nan))
    credit = SFT(length).build({"length": 1.0}).credit
    advantage = credit([nothing], trajectory, lambda where, t: torch.ones(1), None, torch.tensor([0, 0, 1]))
    assert_close(advantage.weight, mask * torch.tensor(wanted)[:, None])
    assert advantage.values.shape == (1, 3, 1)
    assert bool((advantage.values == 1).all())


def test_references_are_tokens_as_the_policy_would_write_them():
    policy = policy_of()
    prompts = asked(taught())
    trajectory = policy.sample(prompts, GIVEN, ())
    assert trajectory.outcome.media == [extra["reference"] for extra in prompts.extra]
    assert policy.forwards.sample == 0
    last = trajectory.replay["token"][torch.arange(6), trajectory.mask.sum(1) - 1]
    assert set(last.tolist()) == {policy.adapter.end} <= set(policy.adapter.ends)
    # What the policy itself writes is, given back as a reference, as likely as when it was drawn.
    drawn = policy.sample(prompts, Plan(1), (0, "sample"))
    told = [
        {**extra, "reference": text} for extra, text in zip(prompts.extra, drawn.outcome.media, strict=True)
    ]
    mean = drawn.log_prob.sum(1) / drawn.mask.sum(1)
    assert_close(policy.reference_log_prob(replace(prompts, extra=told)), mean, atol=1e-5, rtol=0)


def test_long_references_are_cut_and_strange_ones_refused():
    policy = policy_of(text=TextSettings(max_tokens=5))
    trajectory = policy.sample(asked(taught(2)), GIVEN, ())
    assert trajectory.mask.all()
    assert not torch.isin(trajectory.replay["token"], torch.tensor(policy.adapter.ends)).any()
    for extra, said in (
        ({"image": "x"}, 'no "reference"'),
        ({"reference": "<image>"}, "holds '<image>'"),
    ):
        with pytest.raises(ValueError, match=said):
            policy.sample(asked([Prompt("Describe the picture.", extra)]), GIVEN, ())


def test_long_texts_come_first_and_groups_stay_together():
    group, length = torch.tensor([7, 7, 3, 3, 5, 5]), torch.tensor([2, 9, 4, 1, 12, 3])
    assert by_length(group, length).tolist() == [4, 5, 0, 1, 2, 3]
    assert by_length(torch.arange(4), torch.tensor([1, 5, 5, 9])).tolist() == [3, 1, 2, 0]


def test_picks_are_padded_little():
    policy = policy_of()
    trajectory = policy.sample(asked(taught(40)), GIVEN, ())
    lengths = trajectory.mask.sum(1)

    def padding(parts: list[torch.Tensor]) -> int:
        return sum(int((lengths[part].max() - lengths[part]).sum()) for part in parts)

    sorted_ = [torch.unique(pick.rows) for pick in policy.picks(trajectory, torch.arange(40), 8)]
    assert torch.cat(sorted_).sort().values.tolist() == list(range(40))
    assert padding(sorted_) < padding(list(torch.arange(40).split(8))) / 3


@pytest.mark.slow
def test_it_learns_and_a_stopped_run_ends_as_one_that_ran_through(tmp_path):
    through = trainer(SFT(), policy_of(), iterations=4)
    before = through.policy.reference_log_prob(asked(taught()))
    through.run()
    assert through.policy.reference_log_prob(asked(taught())).mean() > before.mean() + 0.05
    trainer(SFT(), policy_of(), iterations=2, run_dir=tmp_path).run()
    again = trainer(SFT(), policy_of(), iterations=4, run_dir=tmp_path)
    again.run()
    assert again.iteration == 4
    pairs = zip(through.policy.module.parameters(), again.policy.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


SMALL = [
    "prompts.per_iteration=4",
    "policy.text.max_tokens=16",
    "policy.lora={rank: 4, alpha: 8}",
    "training.iterations=1",
    "training.updates=1",
    "evaluation.prompts=2",
    "evaluation.seeds=1",
    "run.tensorboard=false",
]


def scores(run: Path, name: str) -> dict[str, float]:
    found = json.loads((run / f"evaluation/{name}.json").read_text())["scores"]
    return {key: value["mean"] for key, value in found.items()}


@pytest.mark.slow
def test_another_method_begins_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    warm, after = tmp_path / "warm", tmp_path / "after"
    assert main(["train", "--config", "assets/recipes/lab_sft.yaml", *SMALL, f"run.dir={warm}"]) == 0
    start = [
        "--config",
        "assets/recipes/lab_holistic.yaml",
        *SMALL,
        "prompts.group=2",
        f"policy.weights={warm}",
    ]
    assert main(["train", *start, "algorithm.kl=0.01", f"run.dir={after}"]) == 0
    end, begin = scores(warm, "trained"), scores(after, "base")
    shared = end.keys() & begin.keys()
    assert "reference_log_prob" in shared
    assert {key: end[key] for key in shared} == {key: begin[key] for key in shared}
    assert begin["reference_log_prob"] != scores(warm, "base")["reference_log_prob"]
    # The KL of the first update is to the warm start, from which it begins.
    first = json.loads((after / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def test_weights_to_begin_with_must_be_there_and_fit(tmp_path):
    teacher = trainer(SFT(), policy_of(), run_dir=tmp_path)
    teacher.run()
    warm = policy_of()
    begin(warm, str(tmp_path))
    pairs = zip(teacher.policy.module.parameters(), warm.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="does not fit this policy"):
        begin(policy_of(lora=LoraSettings(rank=2, alpha=8)), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        begin(warm, "nowhere")


def test_all_weights_make_a_captioner_of_their_own(tmp_path):
    policy = policy_of(lora=LoraSettings(rank=0))
    trainer(SFT(), policy, learning_rate=1e-4).run()
    policy.save(tmp_path)
    again = load(PolicySettings(str(tmp_path / "model"), lora=LoraSettings(rank=4, alpha=8)), Noise())
    assert isinstance(again, CaptionPolicy)
    prompts = asked(taught(2))
    assert_close(again.reference_log_prob(prompts), policy.reference_log_prob(prompts), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prompts.file=assets/lab/prompts/train.txt"], 'learns from the "reference" of each prompt'),
        (["algorithm.name=grpo"], "prompts.group must be at least 2"),
    ],
)
def test_what_it_cannot_learn_from_is_said_before_it_begins(overrides, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    given = ["train", "--config", "assets/recipes/lab_sft.yaml", *overrides, f"run.dir={tmp_path}"]
    assert main(given) == 2
    assert said in capsys.readouterr().err
