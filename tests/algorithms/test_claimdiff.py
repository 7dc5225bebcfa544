"""ClaimDiff-RL (arXiv:2605.20278): claims as the unit of reward and, where they have a place, of credit."""

import pytest
import torch
from torch.testing import assert_close
from words import Claims, ToyWriter, pictures, spans, trainer

from mmalign.algorithms.claimdiff import ClaimDiffRL
from mmalign.credit import Peers
from mmalign.records import Evaluation, Minibatch, Outcome, Pick, Plan, RewardSignal, Spans, Unit

TOLD = {"red", "blue", "dog", "cat"}


def written(seed: int = 0, group: int = 8):
    policy = ToyWriter(seed=seed)
    return policy, policy.sample(pictures(2, group).at(0), Plan(1), (0, "t"))


def credited(method: ClaimDiffRL, policy, trajectory, signal):
    return method.build({signal.name: 1.0}).credit(
        [signal], trajectory, policy.locate, Peers(trajectory.outcome.prompts)
    )


def speaks(policy, trajectory) -> torch.Tensor:
    """Which words a claim consists of, [B, S]."""
    told = torch.tensor([word in TOLD for word in policy.words])
    return told[trajectory.replay["token"]] & trajectory.mask


def gradient(policy, trajectory, method, signal) -> torch.Tensor:
    """Of the loss by the log-probability of each action, [B, S]."""
    found = credited(method, policy, trajectory, signal)
    row, column = trajectory.mask.nonzero(as_tuple=True)
    grid = trajectory.log_prob.shape
    values, weight = found.values.expand(1, *grid), found.weight.expand(grid)
    slopes = torch.zeros(grid)
    likely = trajectory.log_prob[row, column].clone().requires_grad_()

    class Told:
        def evaluate(self, trajectory, pick, guidance=None):
            return Evaluation(likely)

    batch = Minibatch(trajectory, Pick(row, column), values[:, row, column], weight[row, column])
    losses, _ = method.build({signal.name: 1.0}).objective(Told(), batch)
    slopes[row, column] = torch.autograd.grad(losses.sum(), likely)[0]
    return slopes


def test_token_credit_has_no_gradient_outside_of_claims():
    policy, trajectory = written()
    signal = Claims(by_claim=True)(trajectory.outcome)
    inside = speaks(policy, trajectory)
    slopes = gradient(policy, trajectory, ClaimDiffRL("token"), signal)
    assert not slopes[~inside].any()
    assert (slopes[inside] != 0).all()
    assert (trajectory.mask & ~inside).any(), "every word is a claim, so that nothing is shown"
    everywhere = gradient(policy, trajectory, ClaimDiffRL("sequence"), signal)
    assert everywhere[trajectory.mask & ~inside].any()


def test_token_credit_is_that_of_the_formula():
    policy, trajectory = written()
    signal = Claims(by_claim=True)(trajectory.outcome)
    found = credited(ClaimDiffRL("token"), policy, trajectory, signal).values[0]
    wanted = torch.zeros_like(found)
    tokens = [[policy.words[i] for i in row] for row in trajectory.replay["token"].tolist()]
    truth = ({"red", "dog"}, {"blue", "cat"})
    for group in (0, 1):
        rows = (trajectory.group == group).nonzero().flatten().tolist()
        mine = {
            (b, s): 1.0 if word in truth[int(trajectory.outcome.prompts.text[b])] else -1.0
            for b in rows
            for s, word in enumerate(tokens[b])
            if word in TOLD
        }
        values = torch.tensor(list(mine.values())).double()
        for (b, s), value in mine.items():
            wanted[b, s] = (value - values.mean()) / (values.std(correction=0) + 1e-4)
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_sequence_credit_is_that_of_the_sum_over_all_words():
    policy, trajectory = written()
    parts, total = (Claims(by_claim)(trajectory.outcome) for by_claim in (True, False))
    whole = RewardSignal("claims", total.values, valid=parts.valid.any(1, keepdim=True))
    found = credited(ClaimDiffRL("sequence"), policy, trajectory, parts)
    wanted = credited(ClaimDiffRL("sequence"), policy, trajectory, whole)
    assert_close(found.values.expand(1, *trajectory.log_prob.shape), wanted.values.expand(1, 16, 8))
    assert_close(found.weight, wanted.weight)


def test_both_is_the_sum_of_the_two():
    policy, trajectory = written()
    signal = Claims(by_claim=True, missing=0.5)(trajectory.outcome)
    sequence, token, both = (
        credited(method, policy, trajectory, signal).values
        for method in (ClaimDiffRL("sequence"), ClaimDiffRL("token"), ClaimDiffRL("both", located=0.4))
    )
    assert_close(both, sequence + 0.4 * token)


def test_what_is_missing_speaks_about_the_whole_caption():
    policy, trajectory = written()
    signal = Claims(by_claim=True, missing=0.5)(trajectory.outcome)
    slopes = gradient(policy, trajectory, ClaimDiffRL("token"), signal)
    complete = ~(signal.values == -0.5).any(1)
    before_end = trajectory.mask & (trajectory.replay["token"] != 0)
    outside = before_end & ~speaks(policy, trajectory)
    assert not slopes[complete][outside[complete]].any()
    assert (slopes[~complete][outside[~complete]] != 0).all()


def test_upstream_credit_reaches_the_words_before_a_claim():
    policy, trajectory = written()
    signal = Claims(by_claim=True)(trajectory.outcome)
    found = credited(ClaimDiffRL("upstream"), policy, trajectory, signal).values[0]
    local = credited(ClaimDiffRL("token"), policy, trajectory, signal).values[0]
    assert_close(found, local.flip(1).cumsum(1).flip(1).clamp(-5, 5), rtol=1e-5, atol=1e-5)


def test_no_advantage_no_gradient():
    policy, trajectory = written()
    signal = Claims(by_claim=True)(trajectory.outcome)
    even = RewardSignal("claims", torch.ones_like(signal.values), Unit.CLAIM, signal.valid, signal.where)
    for credit in ("token", "upstream"):  # the sum of the others tells the numbers of claims apart
        assert not gradient(policy, trajectory, ClaimDiffRL(credit), even).any()
    one = RewardSignal("claims", torch.ones(16, 1))
    for credit in ("sequence", "token", "upstream", "both"):
        assert not gradient(policy, trajectory, ClaimDiffRL(credit), one).any()


def test_claims_of_captions_without_a_verdict_count_nothing():
    class Some(Claims):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            found = super().__call__(outcome)
            silent = torch.arange(len(found.values)) % 3 == 0
            return RewardSignal(
                "claims", found.values, Unit.CLAIM, found.valid & ~silent[:, None], found.where
            )

    policy, trajectory = written()
    found = credited(ClaimDiffRL("both"), policy, trajectory, Some(by_claim=True)(trajectory.outcome))
    assert not found.weight[::3].any()
    assert found.weight.sum().item() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:reward 'claims'")
@pytest.mark.parametrize("credit", ["sequence", "token", "upstream", "both"])
def test_every_credit_learns_to_tell_the_truth(credit):
    class Watch(Claims):
        """The share of the claims that are false, which nothing is trained on."""

        name = "false"

        def __call__(self, outcome: Outcome) -> RewardSignal:
            found = Claims(by_claim=True)(outcome)
            wrong = (found.values < 0).sum(1) / found.valid.sum(1)
            return RewardSignal("false", wrong[:, None])

    one = trainer(
        ClaimDiffRL(credit), 20, [Claims(by_claim=True), Watch(name="false")], {"false": 0.0}, group=16
    )
    one.run()
    seen = [metrics["reward/false"] for metrics in one.tracker.metrics.values()]
    assert sum(seen[-3:]) < 0.6 * sum(seen[:3])


def test_spans_of_the_toy_are_found_in_its_text():
    assert spans(["a red dog .", ""], {"red", "dog"}) == [[(2, 5), (6, 9)], []]
    policy, trajectory = written()
    where = Claims(by_claim=True)(trajectory.outcome).where
    assert isinstance(where, Spans)
    assert policy.locate(where, trajectory).shape == (16, where.start.shape[1], 8)
