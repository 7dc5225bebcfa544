"""Teachers of a real pipeline: LoRA folders become copies of the adapter, and the student stays itself."""

import pytest
import torch
from toys import Brightness
from training import trainer

from mmalign.algorithms.distill import Distill
from mmalign.contracts import LoraSettings
from mmalign.data import Prompt, PromptSource


def trained(policy):
    return [p for p in policy.module.parameters() if p.requires_grad]


@pytest.fixture
def teacher(make, tmp_path):
    """A policy with weights of its own, and the folder it was written into."""
    policy = make()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained(policy):
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    policy.save(tmp_path)
    return policy, tmp_path


def pupil(policy, folder, **settings):
    prompts = PromptSource([Prompt("a red cat"), Prompt("two dogs")], 2, 2, 0)
    method = Distill(steps=3, teachers={"tuned": str(folder)})
    return trainer(method, 4, policy=policy, prompts=prompts, reward=Brightness(), **settings)


def test_a_lora_folder_teaches_a_student(make, teacher):
    taught, folder = teacher
    policy = make(Distill().noise)
    before = [p.detach().clone() for p in trained(policy)]
    found = pupil(policy, folder)
    assert all(map(torch.equal, trained(policy), before))
    assert all(map(torch.equal, policy.copies.state_dict()["tuned"], trained(taught)))
    found.run()
    kl = [row["kl"] for row in found.tracker.metrics.values()]
    assert kl[-1] < kl[0]
    assert all(map(torch.equal, policy.copies.state_dict()["tuned"], trained(taught)))


def test_a_lora_of_another_shape_is_refused(make, teacher):
    with pytest.raises(ValueError, match="does not fit this policy"):
        pupil(make(Distill().noise, lora=LoraSettings(rank=2, alpha=6)), teacher[1])
