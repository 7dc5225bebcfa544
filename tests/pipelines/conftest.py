"""A tiny SD3 pipeline on disk, and policies over it."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.pipelines import load
from mmalign.pipelines.flow import FlowPolicy
from mmalign.pipelines.sd3 import SD3
from mmalign.sde import Noise
from mmalign.testing import prompts_of, tiny_sd3

TEXTS = ["a red cat", "two blue dogs on the left"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_without_t5(tmp_path_factory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "without_t5", t5=False)


@pytest.fixture(scope="session")
def fresh() -> dict[tuple[object, ...], SD3]:
    return {}


@pytest.fixture
def make(tiny, fresh):
    """`make(noise, kind=..., split=..., chunk=..., folder=..., **settings)`: a policy over the tiny model.

    What was read from disk once is copied, which is faster than reading it again.
    """

    def build(noise=None, *, kind=FlowPolicy, folder=tiny, split="whole", chunk=64, seed=0, **settings):
        settings = {"max_sequence_length": 12, "lora": LoraSettings(rank=4, alpha=6)} | settings
        policy, noise = PolicySettings(str(folder), **settings), noise or Noise()
        read = (policy.model, policy.precision, policy.lora.rank == 0, policy.leave_out)
        if read not in fresh:
            fresh[read] = SD3(policy)
        adapter = copy.deepcopy(fresh[read])
        adapter.max_sequence_length = policy.max_sequence_length
        return kind(adapter, policy, noise, split=split, chunk=chunk, seed=seed)

    return build


@pytest.fixture(scope="session")
def shared_policy(tiny) -> FlowPolicy:
    """One policy for tests that change nothing in it."""
    return load(PolicySettings(str(tiny), max_sequence_length=12, lora=LoraSettings(4, 6)), Noise())


@pytest.fixture
def prompts():
    return prompts_of(TEXTS, 3)


@pytest.fixture
def with_scheduler(tiny, tmp_path):
    """A copy of the tiny folder with other settings of its scheduler."""

    def build(**config) -> Path:
        folder = tmp_path / "other_scheduler"
        shutil.copytree(tiny, folder)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return build
