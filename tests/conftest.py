import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# Examples are the same in every run, and a slow machine fails no test. To search for new counterexamples:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")

WORKERS = 8  # at most: each holds torch and its models in memory


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Whole folders are tested by a process for each core; files named on the command line, by this one."""
    named = config.invocation_params.args
    if any(name.split("::")[0].endswith(".py") for name in named if isinstance(name, str)):
        config.option.dist = "no"
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: one thread of torch each, in the processes that tests start too."""
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that draws without a generator of its own draws the same every time."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global stream is what is to be fixed
    torch.manual_seed(0)
