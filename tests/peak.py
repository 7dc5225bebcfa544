"""Runs one iteration in a process of its own, and says how many bytes it needed beside what a tiny one left.

python tests/peak.py RECIPE [section.field=value ...]
"""

import ctypes
import gc
import json
import sys

import torch


def resident(what: str) -> int:
    """Bytes that are resident now (VmRSS), or were at most since `forget` (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(what))


def forget() -> None:
    """Let the most that was resident begin again from now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def iterate(overrides: list[str]) -> None:
    config = load_config(sys.argv[1], overrides)
    trainer = assemble(config, write=False).trainer
    # Not the loading, during which the kernel shows fp32 files beside the bf16 weights that are made of them.
    forget()
    trainer.run()


if __name__ == "__main__":
    from mmalign.assembly import assemble
    from mmalign.config import load_config

    torch.set_num_threads(1)
    # What libraries load and keep once, whatever the size of a run: by the recipe's own model, a small one.
    given = [
        one
        for one in sys.argv[2:]
        if not one.startswith(("policy.model=", "policy.height=", "policy.width="))
    ]
    iterate([*given, "prompts.per_iteration=2", "prompts.group=2", "training.batch=2", "policy.chunk=2"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    iterate(sys.argv[2:])
    print(json.dumps({"peak": resident("VmHWM") - before}))
