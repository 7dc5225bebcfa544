"""How far the pictures of a model lie from references, and from each other, in the features of a network.

KID (Binkowski et al. 2018, arXiv:1801.01401) is the unbiased estimate of the squared maximum mean discrepancy
under the kernel (x.y / d + 1)^3: 0 in the mean where both sets come from one law, and so sometimes below 0.
Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991): the share of pictures that lie no
farther from some reference than its k-th neighbor among the references, and the same with sides exchanged.
All of it in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from mmalign.randomness import generator

Extract = Callable[[Tensor], Tensor]  # pictures [n, 3, H, W] in [0, 1] to features [n, D]


def pixels(images: Tensor, side: int = 8) -> Tensor:
    """Pixels pooled to side x side: features without a network, blind to detail."""
    return adaptive_avg_pool2d(images.float(), side).flatten(1)


def extracted(extract: Extract, images: Tensor, batch: int = 64) -> Tensor:
    """Features of all pictures, [B, D] float64 on the CPU."""
    with torch.no_grad():
        return torch.cat([extract(part).double().cpu() for part in torch.split(images, batch)])


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of all pairs of [n, D] and [m, D], [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features [n, D] and [m, D], two rows or more each."""
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"KID needs two pictures or more on either side, got {n} and {m}")
    x, y = x.double(), y.double()
    within = [
        (k.sum() - k.diagonal().sum()) / (s * (s - 1)) for k, s in ((kernel(x, x), n), (kernel(y, y), m))
    ]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


def kid_parts(x: Tensor, y: Tensor) -> Tensor:
    """What each of x [n, D] adds to the KID against y [m, D]: [n], whose mean is the KID.

    By its first-order influence, 2 mean_j k(x_i, x_j) - 2 mean_j k(x_i, y_j) and what makes the mean right,
    so that means over draws of x spread as the KIDs of those draws do.
    """
    x, y = x.double(), y.double()
    alike = kernel(x, x)
    influence = 2 * ((alike.sum(1) - alike.diagonal()) / (len(x) - 1) - kernel(x, y).mean(1))
    return influence + kid(x, y) - influence.mean()


def kid_interval(x: Tensor, y: Tensor, subsets: int = 100, seed: int = 0) -> tuple[float, float]:
    """Where the middle 95 % of the KIDs of random halves of both sets lie: how far chance may move it."""
    draws = generator(seed, "kid")
    found = [
        kid(*(s[torch.randperm(len(s), generator=draws)[: max(2, len(s) // 2)]] for s in (x, y)))
        for _ in range(subsets)
    ]
    low, high = (
        torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    )
    return low, high


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of pictures x [n, D] within the references y [m, D], and of references within the pictures."""
    if min(len(x), len(y)) <= k:
        raise ValueError(
            f"precision and recall by {k} neighbors need more pictures, got {len(x)} and {len(y)}"
        )
    return _covered(x.double(), y.double(), k), _covered(y.double(), x.double(), k)


def _covered(x: Tensor, y: Tensor, k: int) -> float:
    """Share of x that lies within the k-th neighbor's distance of some y."""
    radius = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1, 1).values
    gap = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return float((gap <= radius).any(1).double().mean())


def variety(features: Tensor, group: Tensor) -> float | None:
    """How much the pictures of one prompt differ: mean over prompts of 1 - cosine of two of them.

    features: [B, D]; group: [B]. None where no prompt has two.
    """
    unit, found = normalize(features.double(), dim=1), []
    for number in torch.unique(group):
        members = unit[group == number]
        if (count := len(members)) > 1:
            cosine = (members @ members.T).sum() - count
            found.append(1 - cosine / (count * (count - 1)))
    return float(torch.stack(found).mean()) if found else None


@dataclass(frozen=True)
class Distances:
    """What a set of pictures is like beside references, in the features of one network."""

    kid: float
    kid_interval: tuple[float, float]
    precision: float
    recall: float
    variety: float | None
    pictures: int
    references: int


def compare(features: Tensor, group: Tensor, references: Tensor) -> Distances:
    """All of it for features [B, D] of pictures of the prompts `group` [B], and references [m, D]."""
    return Distances(
        kid(features, references),
        kid_interval(features, references),
        *precision_recall(features, references),
        variety(features, group),
        len(features),
        len(references),
    )
