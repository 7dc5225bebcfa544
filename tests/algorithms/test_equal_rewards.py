"""Where rewards say the same of all samples, no method has anything to learn."""

from dataclasses import dataclass

import pytest
import torch
from ranks import SCENARIOS, Brighter, follow

from mmalign.distributed import Distributed
from mmalign.records import RewardSignal


@dataclass
class Equal:
    """The same for all, whatever they are."""

    name: str

    def __call__(self, outcome):
        return RewardSignal(self.name, torch.full((len(outcome.media), 1), 0.7))


class Even(Brighter):
    """Prefers no picture."""

    def prefer(self, prompts, first, second):
        return torch.full((len(prompts),), 0.5)


# A teacher speaks whatever the rewards say, and the first gradients of the other are lost.
COMPARING = [name for name in SCENARIOS if name not in ("taught", "half precision that overflows, split")]


@pytest.mark.filterwarnings("ignore:reward 'brightness'")
@pytest.mark.parametrize("scenario", COMPARING)
def test_equal_rewards_have_no_gradient(scenario):
    given = SCENARIOS[scenario] | {"updates": 1}
    judge = given.get("reward")
    second = Even(judge.both_orders) if isinstance(judge, Brighter) else Equal("brightness")
    usual = follow(given, Distributed("cpu"), iterations=1)
    found = follow(given | {"first": Equal("redness"), "reward": second}, Distributed("cpu"), iterations=1)
    (moved,), (still,) = usual["metrics"].values(), found["metrics"].values()
    assert moved["grad_norm_max"] > 1e-4
    assert still.get("grad_norm_max", 0.0) < 1e-7
