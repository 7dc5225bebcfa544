"""Methods of the forward process, of preferences and of distillation go on where they were stopped."""

import pytest
import torch
from training import trainer

from mmalign.algorithms.awm import AWM
from mmalign.algorithms.crd import CRD
from mmalign.algorithms.ddpo import DDPO
from mmalign.algorithms.dgpo import DGPO
from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.distill import Distill
from mmalign.algorithms.dpok import DPOK, ValueSettings
from mmalign.algorithms.pref_grpo import PrefGRPO
from mmalign.algorithms.trajectory_balance import TrajectoryBalance
from mmalign.copies import Ramp
from mmalign.records import Renoise
from mmalign.sde import Noise

TWO, ALIKE = Renoise(2), Renoise(2, shared=True)
SLOW = Ramp(0.2, 0.1, 0.9)
METHODS = [
    AWM(steps=3, renoise=TWO, ema=SLOW),
    AWM(steps=3, renoise=TWO, ratio="sample"),
    CRD(steps=3, renoise=TWO, kl_guidance=None, old=SLOW, sampler=Ramp(0.0, 0.5, 0.9, wait=1)),
    DDPO(steps=3, clip=None, buffer=6, least=5, noise=Noise("flow", 0.7)),
    DPOK(steps=3, clip=None, kl=0.1, value=ValueSettings(1e-2, batch=16)),
    DGPO(steps=3, renoise=ALIKE, average=SLOW, live_until=2),
    DiffusionDPO(steps=3, renoise=ALIKE, refresh=2),
    DiffusionNFT(steps=3, renoise=TWO, old=SLOW),
    Distill(steps=3, guidance=2.0),
    PrefGRPO(steps=3, clip=1e-2, rewards="scores"),
    TrajectoryBalance(steps=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_stopped_run_ends_bit_for_bit_as_one_that_ran_through(method, tmp_path):
    through = trainer(method, 4)
    through.run()
    trainer(method, 2, tmp_path).run()
    again = trainer(method, 4, tmp_path)
    again.run()
    assert again.iteration == 4
    for a, b in zip(through.learner.parameters, again.learner.parameters, strict=True):
        assert torch.equal(a, b)
    one, two = through.policy.copies.state_dict(), again.policy.copies.state_dict()
    assert one.keys() == two.keys()
    for name, tensors in one.items():
        assert all(map(torch.equal, tensors, two[name])), name
