"""One process alone; what several do together is in test_two_processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmalign.distributed import Distributed

ROOT = Path(__file__).parents[1]


def test_alone_a_process_is_the_main_one_and_gathers_itself():
    alone = Distributed("cpu")
    assert (alone.rank, alone.world, alone.is_main, alone.kind, alone.sharded) == (0, 1, True, "no", False)
    rows = torch.tensor([[2**62, 1]])
    assert torch.equal(alone.gather(rows), rows)
    assert alone.gather_objects([{"a": 1}]) == [{"a": 1}]
    assert alone.any(True)
    assert not alone.any(False)
    alone.barrier()


def test_a_loss_in_parts_has_the_gradient_of_the_whole():
    alone = Distributed("cpu")
    model = nn.Linear(3, 1)
    module, optimizer = alone.prepare(model, torch.optim.AdamW(model.parameters()))
    assert alone.unwrap(module) is model
    x = torch.randn(6, 3)
    for i in range(3):
        with alone.minibatch(module, last=i == 2):
            alone.backward(module(x[2 * i : 2 * i + 2]).sum())
    whole = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for p, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad)
    norm = alone.clip(model.parameters(), 0.1)
    assert norm > 0.1
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm(), torch.tensor(0.1)
    )
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_accelerate_is_imported_by_one_module():
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("mmalign", "pipelines", "rewardmodels")
        for path in (ROOT / folder).rglob("*.py")
        if any(line.strip().startswith(("import accelerate", "from accelerate")) for line in path.open())
    ]
    assert found == ["mmalign/distributed.py"]
