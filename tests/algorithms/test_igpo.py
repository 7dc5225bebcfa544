"""IGPO (arXiv:2510.14967): sentences are paid for the information they add, and for what follows."""

import pytest
import torch
from torch.testing import assert_close
from words import ToyWriter, pictures, trainer

from mmalign.algorithms.igpo import IGPO, returns
from mmalign.credit import Credit, Peers, per_action, zscore
from mmalign.records import Outcome, Plan, RewardSignal, Spans, Unit


class Sentences:
    """A gain for each sentence of a text, which a full stop ends: the share of `dog` among its words."""

    name = "gains"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        rows = []
        for text in outcome.media:
            place, row = 0, []
            for sentence in text.split(".") if text else []:
                if sentence.strip():
                    row.append((place, place + len(sentence), sentence.split().count("dog")))
                place += len(sentence) + 1
            rows.append(row)
        filled = torch.full((len(rows), max(1, *map(len, rows)), 3), torch.nan)
        for i, row in enumerate(rows):
            if row:
                filled[i, : len(row)] = torch.tensor(row).float()
        place = filled[..., :2].nan_to_num().long()
        return RewardSignal(self.name, filled[..., 2], Unit.CLAIM, where=Spans(place[..., 0], place[..., 1]))


def test_a_sentence_answers_for_itself_and_for_what_follows():
    gains = torch.tensor([[0.15, -0.05, 0.45], [0.2, 0.1, 0.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    group = torch.zeros(2).long()
    apart = zscore(gains, valid, group, False)
    for gamma in (0.0, 0.5, 1.0):
        wanted = [
            [sum(gamma ** (k - t) * float(apart[b, k]) for k in range(t, 3)) for t in range(3)]
            for b in range(2)
        ]
        found = returns(gains, valid, group, False, gamma=gamma)
        assert_close(found, torch.tensor(wanted).double())
    assert_close(returns(gains, valid, group, False, gamma=1.0)[:, 0], apart.sum(1))


def test_verdicts_on_whole_texts_are_not_summed_up():
    values, valid, group = torch.rand(4, 3), torch.ones(4, 3).bool(), torch.zeros(4).long()
    assert torch.equal(returns(values, valid, group, True, gamma=1.0), zscore(values, valid, group, True))


def test_without_a_discount_it_is_credit_that_reaches_upstream():
    policy = ToyWriter(length=16, seed=2)
    trajectory = policy.sample(pictures().at(0), Plan(1), (0, "t"))
    signal = Sentences()(trajectory.outcome)
    assert signal.valid.sum(1).max() > 1, "no text has two sentences"
    peers = Peers(trajectory.outcome.prompts)
    upstream = Credit({"gains": 1.0}, zscore, "normalized", "upstream", per_action)
    wanted = upstream([signal], trajectory, policy.locate, peers).values
    found = IGPO(gamma=1.0).build({"gains": 1.0}).credit([signal], trajectory, policy.locate, peers).values
    spoken = policy.locate(signal.where, trajectory).mul(signal.valid[..., None]).amax(1) > 0
    assert_close(found[0][spoken], wanted[0][spoken])
    assert not found[0][~spoken].any()


@pytest.mark.filterwarnings("ignore:reward .gains.")
def test_the_policy_learns_and_settings_are_checked():
    one = trainer(IGPO(gamma=0.5, kl=0.0), 25, [Sentences()])
    one.run()
    seen = [metrics["reward/gains"] for metrics in one.tracker.metrics.values()]
    assert sum(seen[-3:]) > sum(seen[:3]) + 0.6
    with pytest.raises(ValueError, match="gamma must lie in"):
        IGPO(gamma=1.5)
