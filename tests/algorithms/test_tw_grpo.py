"""TW-GRPO (arXiv:2505.24718): weights of positions from the disagreement of a group."""

import pytest
import torch
from torch.testing import assert_close
from words import Claims, ToyWriter, pictures, trainer

from mmalign.algorithms.tw_grpo import COLUMNS, TWGRPO, disagreement, loudness, spread
from mmalign.credit import Credit, Peers, per_action, zscore
from mmalign.records import Plan


def written(group: int = 6):
    policy = ToyWriter()
    return policy, policy.sample(pictures(2, group).at(0), Plan(1), (0, "t"))


def naive(log_p: torch.Tensor) -> torch.Tensor:
    """K_t by the formula, one number at a time; log_p: [G, S, V]."""
    texts, positions, words = log_p.shape
    found = []
    for t in range(positions):
        total = 0.0
        for v in range(words):
            mean = sum(float(log_p[i, t, v]) for i in range(texts)) / texts
            for i in range(texts):
                d = torch.tensor(min(max(mean - float(log_p[i, t, v]), -11.0), 11.0), dtype=torch.float64)
                total += float(d.exp() - d - 1)
        found.append(total / texts)
    return torch.tensor(found)


def test_the_position_where_two_texts_part_weighs_alpha():
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.1, 0.9]]])
    assert_close(loudness(spread(p.log()), 1.7), torch.tensor([1.0, 1.7]))


def test_k_is_that_of_the_formula():
    log_p = torch.randn(5, 7, 9).mul(4).log_softmax(-1)
    assert_close(spread(log_p), naive(log_p), rtol=1e-4, atol=1e-5)


def test_differences_beyond_the_bound_count_no_more():
    sure = torch.tensor([[[0.0, -40.0]], [[-40.0, 0.0]]])
    assert_close(spread(sure), naive(sure), rtol=1e-5, atol=0)
    assert torch.equal(spread(sure), spread(2 * sure))


def test_equal_distributions_weigh_one_everywhere():
    log_p = torch.randn(1, 6, 50).log_softmax(-1).expand(7, -1, -1)
    assert spread(log_p).abs().max() < 1e-6
    assert torch.equal(loudness(spread(log_p), 1.7), torch.ones(6))


def test_the_order_of_the_texts_does_not_matter():
    log_p = torch.randn(6, 5, 9).log_softmax(-1)
    assert_close(spread(log_p[torch.randperm(6)]), spread(log_p), rtol=1e-5, atol=1e-6)


def test_a_text_that_has_ended_is_uniform_and_chunks_do_not_matter(monkeypatch):
    policy, trajectory = written()
    rows = (trajectory.group == 1).nonzero().flatten()
    ((_, every),) = policy.distributions(trajectory, rows, 100)
    every = torch.where(trajectory.mask[rows][..., None], every, torch.tensor(1 / every.shape[-1]).log())
    assert not trajectory.mask[rows].all(), "no text has ended early, so that nothing is shown"
    assert_close(disagreement(policy, trajectory, rows), naive(every), rtol=1e-4, atol=1e-5)
    whole = disagreement(policy, trajectory, rows)
    monkeypatch.setattr("mmalign.algorithms.tw_grpo.COLUMNS", 3)
    assert_close(disagreement(policy, trajectory, rows), whole, rtol=0, atol=1e-6)
    assert COLUMNS > 3


def test_an_update_is_the_weighted_sum_of_the_formula():
    """Each word's advantage is w A, over the plain number of words; and w carries no gradient."""
    policy, trajectory = written()
    peers, signals = Peers(trajectory.outcome.prompts), [Claims()(trajectory.outcome)]
    method = TWGRPO(alpha=1.7)
    plain = Credit({"claims": 1.0}, zscore, "total_first", "whole", per_action)(
        signals, trajectory, policy.locate, peers
    )
    found = method.weigh(policy, trajectory, plain, peers)
    assert torch.equal(found.weight, plain.weight)
    assert not found.values.requires_grad
    for one in torch.unique(trajectory.group):
        rows = (trajectory.group == one).nonzero().flatten()
        end = int(trajectory.mask[rows].sum(1).max())
        loud = loudness(disagreement(policy, trajectory, rows)[:end], 1.7)
        assert loud.min() == 1
        assert_close(loud.max(), torch.tensor(1.7))
        for row in rows.tolist():
            assert_close(found.values[0, row, :end], plain.values[0, row, 0] * loud)


def test_with_uniform_weights_it_is_grpo():
    class Same(ToyWriter):
        """Tells the same distribution for every text."""

        def distributions(self, trajectory, rows, size):
            for at, log_p in super().distributions(trajectory, rows, size):
                yield at, log_p[:1, :1].expand_as(log_p)

        def sample(self, prompts, plan, key):
            found = super().sample(prompts, plan, key)
            found.mask.fill_(True)  # the ends of texts tell them apart too
            return found

    runs = [trainer(TWGRPO(alpha=alpha), 5, policy=Same()) for alpha in (1.0, 1.7)]
    for one in runs:
        one.run()
    assert runs[0].algorithm.refine is None
    for a, b in zip(runs[0].learner.parameters, runs[1].learner.parameters, strict=True):
        assert_close(a, b, rtol=0, atol=1e-7)


def test_it_costs_one_forward_a_text_more():
    counts = []
    for alpha in (1.0, 1.7):
        one = trainer(TWGRPO(alpha=alpha), 1)
        one.run()
        counts.append(one.policy.forwards.reference)
    assert counts == [0, 16]


def test_a_policy_without_distributions_is_refused():
    class Mute(ToyWriter):
        distributions = None

        def __getattribute__(self, name):
            if name == "distributions":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(TypeError, match="tells its distributions; Mute does not"):
        trainer(TWGRPO(), 1, policy=Mute()).run()
    with pytest.raises(ValueError, match="alpha must be at least 1"):
        TWGRPO(alpha=0.5)
