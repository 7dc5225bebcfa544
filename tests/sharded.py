"""`mmalign train` in one of several processes that shard the network by FSDP2, on the CPU.

Arguments: the class of the layers that are gathered one at a time, then those of mmalign.
"""

from __future__ import annotations

import os
import sys

FSDP = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def main() -> None:
    layer, *asked = sys.argv[1:]
    os.environ.update(FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": layer})
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # accelerate offers FSDP where there are accelerators; what follows is the same on the CPU.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    from torch.distributed.tensor import DTensor

    from mmalign import cli
    from mmalign.trainer import Trainer

    run = Trainer.run

    def watched(trainer: Trainer) -> None:
        run(trainer)
        parameters = list(trainer.policy.module.parameters())
        assert trainer.distributed.kind == "fsdp"
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert sum(p.to_local().numel() for p in parameters) < 0.7 * sum(p.numel() for p in parameters)

    Trainer.run = watched  # type: ignore[method-assign]
    sys.exit(cli.main(asked))


if __name__ == "__main__":
    main()
