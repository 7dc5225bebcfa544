"""One process alone; what several do together is in test_two_processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
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


class DeepSpeed:
    """What of an accelerator under DeepSpeed is looked at."""

    def __init__(self, stage: int, device: str = "none") -> None:
        self.num_processes = 2
        self.distributed_type = SimpleNamespace(value="DEEPSPEED")
        plugin = SimpleNamespace(zero_stage=stage, offload_param_device=device, dschf=object())
        plugin.deepspeed_config = {"train_micro_batch_size_per_gpu": "auto"}
        self.state = SimpleNamespace(deepspeed_plugin=plugin)

    def prepare(self, *parts: object) -> tuple[object, ...]:
        config = self.state.deepspeed_plugin.deepspeed_config
        assert config == {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.3}
        return parts


def test_deepspeed_is_told_the_batch_size_that_it_insists_on_and_where_to_clip(monkeypatch):
    """What it makes of it is in test_sharded, where it is installed."""
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: DeepSpeed(2))
    model = nn.Linear(3, 1)
    found = Distributed("cpu")
    assert (found.sharded, found.holding) == (True, "shards of 2 processes by ZeRO-2")
    assert found.prepare(model, torch.optim.AdamW(model.parameters()), 0.3)[0] is model


def test_weights_on_a_disk_are_refused(monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: DeepSpeed(3, "nvme"))
    with pytest.raises(ValueError, match=r"offload_param_device: .* got nvme, set it to none or cpu"):
        Distributed("cpu")


def test_what_transformers_loads_stays_whole(monkeypatch):
    """It shards while the plugin holds a configuration, of which it only keeps a weak reference."""
    made = DeepSpeed(3)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: made)
    Distributed("cpu")
    assert made.state.deepspeed_plugin.dschf is None


def test_a_loss_in_parts_has_the_gradient_of_the_whole():
    alone = Distributed("cpu")
    model = nn.Linear(3, 1)
    module, optimizer = alone.prepare(model, torch.optim.AdamW(model.parameters()), 0.1)
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
