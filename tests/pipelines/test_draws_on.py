"""Gradients through a real pipeline: network, decoder and reward, with and without checkpointing."""

import pytest
import torch
from torch.testing import assert_close

from mmalign.algorithms.draft import DRaFT
from mmalign.algorithms.refl import ReFL
from mmalign.algorithms.srpo import SRPO
from mmalign.records import Minibatch, Pick, RewardSignal
from mmalign.rewardmodels.lab_colors import LabColors
from mmalign.sde import Noise
from mmalign.testing import prompts_of

KEY = (0, "test")
TEXTS = ["a red cat", "two blue dogs on the left"]


class Contrast:
    """How far pixels are from gray, in fp64, so that small differences can be seen."""

    name = "contrast"

    def __call__(self, outcome):
        return RewardSignal(self.name, self.differentiate(outcome)[:, None])

    def differentiate(self, outcome):
        return 10 * (outcome.media.double() - 0.5).square().mean((1, 2, 3))


def prepared(policy, method, reward=None):
    reward = reward or LabColors(width=0.5, area=0.5)  # far-sighted: random pictures are gray
    algorithm = method.build({reward.name: 1.0})
    algorithm.through.meet([reward])
    trajectory = policy.sample(prompts_of(TEXTS, 2), algorithm.plans(0, 0)[0], KEY)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    batch = Minibatch(trajectory, pick, torch.zeros(1, len(pick)), torch.full((len(pick),), 1 / len(pick)))
    return algorithm.objective, batch


def stir(policy) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))


def gradient(policy, method) -> torch.Tensor:
    objective, batch = prepared(policy, method)
    policy.module.zero_grad()
    objective(policy, batch)[0].sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("method", "calls"),
    [(ReFL(steps=5), 1), (DRaFT(steps=5, last=2), 2), (DRaFT(steps=5, noises=2), 1), (SRPO(steps=5), 2)],
    ids=["ReFL", "DRaFT-2", "DRaFT-LV", "SRPO"],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_only_the_last_forwards_have_gradients_and_all_else_is_frozen(make, method, calls, guidance):
    policy, enabled = make(Noise(level=0.0), guidance=guidance), []
    stir(policy)
    policy.module.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    found = gradient(policy, method)
    assert enabled == [False] * 5 + [True] * calls
    assert found.norm() > 0
    assert found.isfinite().all()
    trained = {id(p) for p in policy.module.parameters() if p.requires_grad}
    for part in policy.adapter.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert all(p.grad is None for p in part.parameters() if id(p) not in trained)


@pytest.mark.parametrize(
    "method", [ReFL(steps=5), DRaFT(steps=5, last=2), SRPO(steps=5)], ids=["1", "2", "s"]
)
def test_checkpointing_does_not_change_the_gradient(make, method):
    found = []
    for checkpointing in (False, True):
        policy = make(Noise(level=0.0), gradient_checkpointing=checkpointing)
        stir(policy)
        found.append(gradient(policy, method))
    assert_close(*found, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("method", [ReFL(steps=4, scale=1.0), DRaFT(steps=4)], ids=["ReFL", "DRaFT"])
def test_the_gradient_is_that_of_differences(make, method):
    """Along the gradient itself, through LoRA, decoder and reward."""
    policy = make(Noise(level=0.0))
    stir(policy)
    objective, batch = prepared(policy, method, Contrast())
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(objective(policy, batch)[0].sum(), parameters)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    size, ends = 0.1, []
    with torch.no_grad():
        for move in (size, -2 * size):
            for p, g in zip(parameters, grads, strict=True):
                p.add_(move * g / norm)
            ends.append(float(objective(policy, batch)[0].double()))
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float(norm), rel=0.03)


def test_at_lora_scale_zero_the_images_are_those_of_the_base(make):
    policy, prompts = make(), prompts_of(TEXTS, 1)
    base = policy.images(prompts, 3, KEY)
    stir(policy)
    assert not torch.equal(policy.images(prompts, 3, KEY), base)
    for module in policy.module.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 0.0
    assert torch.equal(policy.images(prompts, 3, KEY), base)
