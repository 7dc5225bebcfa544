"""Where a trained and a watching reward part."""

import pytest
import torch

from mmalign.evaluation import Evaluated
from mmalign.hacking import partings, trained_on

STEPS = [0, 10, 20, 30, 40]


def runs(trained, watching, prompts=60, noise=0.05, seed=0):
    """Evaluations whose prompts scatter about the given means."""
    draws = torch.Generator().manual_seed(seed)
    ease = torch.randn(prompts, generator=draws)  # some prompts are easy, in every evaluation
    found = []
    for t, w in zip(trained, watching, strict=True):
        rows = {
            name: (mean + 0.3 * ease + noise * torch.randn(prompts, generator=draws)).tolist()
            for name, mean in (("proxy", t), ("gold", w))
        }
        found.append(Evaluated({}, {}, None, rows))
    return found


def test_a_hacked_reward_parts_where_the_watching_one_was_best():
    (found,) = partings(
        STEPS, runs([0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 0.2, 0.3, 0.1, -0.2]), ["proxy"], ["gold"]
    )
    assert found.parted
    assert found.step == 20
    assert found.rise.mean == pytest.approx(0.4, abs=0.05)
    assert found.fall.mean == pytest.approx(-0.5, abs=0.05)


@pytest.mark.parametrize(
    ("trained", "watching"),
    [
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 0.1, 0.2, 0.3, 0.4]),  # both rise
        ([0.0, 0.4, 0.3, 0.2, 0.1], [0.0, 0.3, 0.2, 0.1, 0.0]),  # both fall
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.3, 0.3, 0.3, 0.3, 0.3]),  # it does not care
    ],
)
def test_what_moves_alike_or_stands_still_does_not_part(trained, watching):
    (found,) = partings(STEPS, runs(trained, watching), ["proxy"], ["gold"])
    assert not found.parted


def test_noise_alone_seldom_parts():
    """A curve of pure noise falls after its best step for certain, if both are seen on the same prompts."""
    rise, flat = [0.0, 0.2, 0.4, 0.6, 0.8], [0.3] * 5
    found = [partings(STEPS, runs(rise, flat, 40, 0.3, seed), ["proxy"], ["gold"])[0] for seed in range(60)]
    assert sum(one.parted for one in found) <= 6  # 2.5 % on one side, with room


def test_scores_that_an_evaluation_lacks_are_left_out():
    found = runs([0.0] * 5, [0.0] * 5)
    assert partings(STEPS, found, ["proxy"], ["none"]) == []
    assert partings(STEPS[:2], found[:2], ["proxy"], ["gold"]) == []
    with pytest.raises(ValueError, match="rising steps"):
        partings([0, 20, 10, 30, 40], found, ["proxy"], ["gold"])


def test_trained_rewards_are_those_with_a_weight_at_some_time():
    config = {
        "rewards": {
            "a": 1.0,
            "b": {"weight": 0.0},
            "c": {"weight": {0: 0.0, 9: 1.0}},
            "d": 0,
            "remote/x": {"weight": 1.0, "reward": "x"},
        }
    }
    assert trained_on(config) == ["a", "c", "x"]
    assert trained_on({}) == []
