"""What every method for texts must do: go on where it was stopped, and not mind how its update is cut."""

import pytest
import torch
from torch.testing import assert_close
from words import Claims, pictures, trainer

from mmalign.algorithms.claimdiff import ClaimDiffRL
from mmalign.algorithms.drpo import DRPO
from mmalign.algorithms.igpo import IGPO
from mmalign.algorithms.pow3r import POW3R
from mmalign.algorithms.trust_grpo import TrustGRPO
from mmalign.algorithms.tw_grpo import TWGRPO
from mmalign.records import RewardSignal, Unit


class Verdicts(Claims):
    """Three criteria: nothing false, everything told, and a text that ends."""

    def __call__(self, outcome):
        wrong = (Claims(by_claim=True)(outcome).values < 0).any(1)
        told = Claims()(outcome).values[:, 0] >= 2
        ends = torch.tensor([text.endswith(".") for text in outcome.media])
        return RewardSignal(self.name, torch.stack([~wrong, told, ends], 1).float(), Unit.CRITERION)


class Right(Claims):
    def __call__(self, outcome):
        return RewardSignal(self.name, (super().__call__(outcome).values > 0).float())


ONE, BY_CLAIM = [Claims()], [Claims(by_claim=True, missing=0.5)]
METHODS = {
    "claimdiff sequence": (ClaimDiffRL(kl=0.01), ONE),
    "claimdiff token": (ClaimDiffRL("token"), BY_CLAIM),
    "claimdiff both": (ClaimDiffRL("both"), BY_CLAIM),
    "tw_grpo": (TWGRPO(), ONE),
    "trust_grpo": (TrustGRPO("soft", horizon=3, kl=0.0), [Right(), Claims(name="soft")]),
    "pow3r": (POW3R(), [Verdicts()]),
    "igpo": (IGPO(gamma=0.7), BY_CLAIM),
    "drpo": (DRPO(longest=8), [Right()]),
}


def weights(one) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.learner.parameters]


@pytest.mark.filterwarnings("ignore:reward 'claims'")
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_ends_bit_for_bit_as_one_that_ran_through(name, tmp_path):
    method, rewards = METHODS[name]
    through = trainer(method, 4, rewards)
    through.run()
    trainer(method, 2, rewards, run_dir=tmp_path).run()
    again = trainer(method, 4, rewards, run_dir=tmp_path)
    again.run()
    assert again.iteration == 4
    assert all(map(torch.equal, weights(through), weights(again)))


@pytest.mark.filterwarnings("ignore:reward 'claims'")
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_does_not_depend_on_the_size_of_minibatches(name):
    method, rewards = METHODS[name]
    gradients = []
    for batch in (1000, 3):
        one = trainer(method, 1, rewards, batch=batch, updates=1)
        one.run()
        gradients.append(one.learner.parameters[0].grad)
    assert gradients[0].any()
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:reward 'claims'")
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_any_difference_leaves_the_policy_as_it_is(name):
    class Even:
        def __init__(self, model):
            self.model, self.name = model, model.name

        def __call__(self, outcome):
            found = self.model(outcome)
            return RewardSignal(found.name, torch.ones(len(outcome.media), 1), Unit.CRITERION)

    method, rewards = METHODS[name]
    one = trainer(method, 1, [Even(model) for model in rewards], weight_decay=0.0)
    before = weights(one)
    one.run()
    assert all(map(torch.equal, before, weights(one)))
    assert one.tracker.metrics[0]["groups/flat_share"] == 1
    assert len(pictures().at(0)) == 16
