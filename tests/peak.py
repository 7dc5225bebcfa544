"""Runs one iteration in a process of its own, and says how many bytes it needed beside what imports take.

python tests/peak.py RECIPE [section.field=value ...]
"""

import json
import resource
import sys
import threading
import time


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


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch

    from mmalign.assembly import assemble
    from mmalign.config import load_config

    torch.set_num_threads(1)
    # What libraries allocate once: a first product, a first optimizer.
    first = torch.nn.Linear(64, 64)
    first(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(first.parameters()).step()

    config = load_config(sys.argv[1], sys.argv[2:])
    before, watch = resident(), Watch()
    run = assemble(config, write=False)
    run.trainer.run()
    print(json.dumps({"peak": watch.end() - before}))
