"""`mmalign train`, or bare steps, in one of several processes that shard by DeepSpeed, on the CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

KEPT_WHOLE = (
    32  # elements up to which ZeRO-3 may keep a parameter gathered: some of the tiny SD3, and not its LoRA
)
LIMIT = 0.5


def launched(configuration: Path) -> int:
    """What accelerate's launcher does, where it finds no accelerator; gives the stage."""
    stage: int = yaml.safe_load(configuration.read_text())["deepspeed_config"]["zero_stage"]
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
    }
    import deepspeed
    from accelerate.state import PartialState

    # Collectives of its own are compiled for minutes and wait busily for their peers; those of gloo are not.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(cpu=True)
    return stage


def sharding() -> Distributed:
    from transformers.integrations import is_deepspeed_zero3_enabled

    made = Distributed(None)  # None: accelerate keeps DeepSpeed from whoever asks for the CPU
    assert not is_deepspeed_zero3_enabled()  # else it would shard text encoders as it loads them
    zero = made._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = KEPT_WHOLE
    return made


def train(stage: int, settings: list[str]) -> int:
    """Train, and see that the network was sharded."""
    from mmalign import assembly, cli
    from mmalign.trainer import Trainer

    assembly.Distributed = lambda device: sharding()  # type: ignore[assignment, misc]
    run = Trainer.run

    def watched(trainer: Trainer) -> None:
        run(trainer)
        assert trainer.distributed.kind == "deepspeed"
        parameters = list(trainer.policy.module.parameters())
        if stage == 3:
            assert not all(p.ds_persist for p in parameters if p.requires_grad)
            assert sum(p.ds_tensor.numel() for p in parameters) < 0.7 * sum(p.ds_numel for p in parameters)
            assert all(p.numel() == 0 for p in parameters)

    Trainer.run = watched  # type: ignore[method-assign]
    return cli.main(settings)


def loss(module: nn.Module, rank: int) -> torch.Tensor:
    return (module(torch.full((1, 3), 1.0 + rank)) ** 2).sum()


def update(found: Distributed, module: nn.Module, optimizer: Any, infinite: bool = False) -> float:
    """One update, half the loss in each of two minibatches; gives the norm that is clipped."""
    for last in (False, True):
        with found.minibatch(module, last):
            odd = torch.inf if infinite and found.is_main and not last else 0.0
            found.backward(loss(module, found.rank) / 2 + odd)
    norm = found.clip(module.parameters(), LIMIT).item()
    optimizer.step()
    return norm


def steps(stage: int, folder: Path) -> None:
    """What updates, copies and checkpoints do to weights; the main process says it as JSON."""
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 1)), sharding()
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(loss(model, 0) + loss(model, 1), trained)
    module, optimizer = found.prepare(model, torch.optim.SGD(trained, lr=0.1, momentum=0.9), LIMIT)

    def weights() -> torch.Tensor:
        state = found.whole(module)
        assert state is not None
        assert ("0.bias" in state) == (stage == 2)
        return torch.cat([t.flatten() for t in state.values()]) if state else torch.zeros(0)

    states, norms = [weights()], []
    for i in range(3):
        norms.append(update(found, module, optimizer, infinite=i == 1))
        states.append(weights())
    copies = Copies(module)
    copies.save("kept")
    found.save_sharded(folder)
    kept = loss(module, found.rank).item()
    update(found, module, optimizer)
    states.append(weights())
    live = loss(module, found.rank).item()
    with copies.use("kept"):
        used = loss(module, found.rank).item()
        states.append(weights())
    assert (used, loss(module, found.rank).item()) == (kept, live)
    assert kept != live
    copies.follow("kept", 0.25)
    with copies.use("kept"):
        states.append(weights())
    found.load_sharded(folder)
    states.append(weights())
    update(found, module, optimizer)
    states.append(weights())
    if found.is_main:
        norm = torch.cat([g.flatten() for g in whole]).norm().item()
        print(json.dumps({"norm": norm, "norms": norms, "states": torch.stack(states).tolist()}))
    found.close()


if __name__ == "__main__":
    from mmalign.distributed import Distributed

    stage, (task, *given) = launched(Path(sys.argv[1])), sys.argv[2:]
    if task == "train":
        sys.exit(train(stage, [task, *given]))
    from mmalign.copies import Copies

    steps(stage, Path(task))
