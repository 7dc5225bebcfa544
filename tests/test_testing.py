"""Good rewards pass their check, and broken ones are told what is wrong (policies: tests/pipelines)."""

import dataclasses

import pytest
import torch

from mmalign.records import Masks, Outcome, RewardSignal, Spans, Unit
from mmalign.testing import check_reward, prompts_of, tiny_sd3


def outcome(samples: int = 4) -> Outcome:
    media = torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Outcome(prompts_of(["a", "b"], samples // 2), media)


class Brightness:
    name = "brightness"

    def __call__(self, outcome):
        return RewardSignal(self.name, outcome.media.mean((1, 2, 3))[:, None])


class Quadrants:
    name = "quadrants"
    inside = 1.0

    def __call__(self, outcome):
        mask = torch.zeros(4, 1, 8, 8)
        for i in range(4):
            mask[i, 0, i // 2 * 4 :, i % 2 * 4 :] = self.inside
        values = (outcome.media.mean(1)[:, None, None] * mask).mean((2, 3, 4))
        where = Masks(mask.expand(len(values), -1, -1, -1, -1))
        return RewardSignal(self.name, values, Unit.REGION, where=where)


def test_good_rewards_pass():
    check_reward(Brightness(), outcome())
    check_reward(Quadrants(), outcome())


class Relative(Brightness):
    def __call__(self, outcome):
        signal = super().__call__(outcome)
        return dataclasses.replace(signal, values=signal.values - signal.values.mean())


class Painter(Brightness):
    def __call__(self, outcome):
        outcome.media.mul_(0.5)
        return super().__call__(outcome)


class Misnamed(Brightness):
    name = "darkness"

    def __call__(self, outcome):
        return RewardSignal("brightness", outcome.media.mean((1, 2, 3))[:, None])


class Short(Brightness):
    def __call__(self, outcome):
        return RewardSignal(self.name, torch.zeros(1, 1))


class Silent(Brightness):
    def __call__(self, outcome):
        return RewardSignal(self.name, torch.full((len(outcome.prompts), 1), torch.nan))


class Outside(Quadrants):
    inside = 2.0


class Quoting(Brightness):
    def __call__(self, outcome):
        values = torch.zeros(len(outcome.prompts), 1)
        return RewardSignal(self.name, values, Unit.CLAIM, where=Spans(values.long(), values.long() + 1))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Relative(), "values depend on the batch"),
        (Painter(), "changed its input"),
        (Misnamed(), "the signal of 'darkness' is called 'brightness'"),
        (Short(), "1 verdicts for 4 samples"),
        (Silent(), "no verdict is valid"),
        (Outside(), "a mask has parts above 1"),
        (Quoting(), "only text has Spans"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_reward_is_told_what_is_wrong(reward, message):
    with pytest.raises(AssertionError, match=message):
        check_reward(reward, outcome())


def test_the_tiny_pipeline_is_named_by_its_seed(tmp_path):
    folders = [tiny_sd3(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
