"""Runs one iteration in a process of its own, and says how many bytes it needed beside what a tiny one left.

python tests/peak.py RECIPE [section.field=value ...]
"""

import ctypes
import gc
import json
import resource
import sys
import threading
import time

import torch


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Watch:
    """The most memory that was resident since it began, looked at every two milliseconds."""

    def __init__(self) -> None:
        self.most, self.done = resident(), False
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done:
            self.most = max(self.most, resident())
            time.sleep(0.002)

    def end(self) -> int:
        self.done = True
        self.thread.join()
        return self.most


def iterate(overrides: list[str]) -> None:
    config = load_config(sys.argv[1], overrides)
    assemble(config, write=False).trainer.run()


if __name__ == "__main__":
    from mmalign.assembly import assemble
    from mmalign.config import load_config

    torch.set_num_threads(1)
    # What libraries load and keep once, whatever the size of a run.
    iterate(
        [*sys.argv[2:], "prompts.per_iteration=2", "prompts.group=2", "training.batch=2", "policy.chunk=2"]
    )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, watch = resident(), Watch()
    iterate(sys.argv[2:])
    print(json.dumps({"peak": watch.end() - before}))
