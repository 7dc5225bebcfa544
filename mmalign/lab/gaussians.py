"""Problems with a known answer: mixtures of Gaussians, whose velocity, tilted optimum and limits are exact.

A target p(x0) = sum_k w_k N(m_k, s_k^2 I) noised to x = (1 - sigma) x0 + sigma e stays a mixture, so that the
velocity E[e - x0 | x] is a formula. So is the law that solves

    max E_q[r] - beta KL(q | p),      q(x) ~ p(x) exp(r(x) / beta)

for a reward r(x) = slope . x - curve |x|^2 / 2: another mixture. And for a reward that only looks at which
component a point belongs to, component k has the mass q_k ~ p_k exp(r_k / beta).

`GaussianWorld` is such a target as a flow adapter, so that the sampler, the plans and the objectives of real
models run on it unchanged. What is trained are the parameters of the target, and the optimum is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BOX = 16.0  # media are points of [-BOX, BOX]^D mapped to [0, 1]^D


@dataclass(frozen=True)
class Quadratic:
    """The reward slope . x - curve |x|^2 / 2 of points x [n, D]; slope: [D]."""

    slope: Tensor
    curve: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.slope.to(x.dtype) - self.curve / 2 * x.square().sum(1)


@dataclass(frozen=True)
class Mixture:
    """K isotropic Gaussians in D dimensions; weight: [K], sums to 1; mean: [K, D]; variance: [K]."""

    weight: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def normal(cls, mean: Sequence[float], variance: float) -> Mixture:
        """One Gaussian."""
        return cls(torch.ones(1), torch.tensor([list(mean)]), torch.tensor([variance]))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points [count, D]."""
        k = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        z = torch.randn(count, self.mean.shape[1], generator=generator, dtype=self.mean.dtype)
        return self.mean[k] + self.variance[k, None].sqrt() * z

    def log_parts(self, x: Tensor) -> Tensor:
        """Log of the density that each component gives to x [n, D], [n, K]."""
        gap, spread = (x[:, None] - self.mean).square().sum(2), self.variance
        return self.weight.log() - gap / (2 * spread) - x.shape[1] / 2 * (2 * math.pi * spread).log()

    def log_density(self, x: Tensor) -> Tensor:
        """[n] for x [n, D]."""
        return self.log_parts(x).logsumexp(1)

    def label(self, x: Tensor) -> Tensor:
        """The component that most likely made each point, [n]."""
        return self.log_parts(x).argmax(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and variance [D] of every coordinate."""
        mean = self.weight @ self.mean
        return mean, self.weight @ (self.variance[:, None] + self.mean.square()) - mean.square()

    def noised(self, sigma: float) -> Mixture:
        """The law of (1 - sigma) x0 + sigma e."""
        return Mixture(self.weight, (1 - sigma) * self.mean, (1 - sigma) ** 2 * self.variance + sigma**2)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[e - x0 | x] for x [n, D] at sigma [n]."""
        left = (1 - sigma)[:, None]  # [n, 1]
        spread = left**2 * self.variance + sigma[:, None] ** 2  # [n, K]
        gap = x[:, None] - left[..., None] * self.mean  # [n, K, D]
        fit = self.weight.log() - gap.square().sum(2) / (2 * spread) - x.shape[1] / 2 * spread.log()
        pull = (sigma[:, None] - left * self.variance) / spread  # of e less that of x0
        return (fit.softmax(1)[..., None] * (pull[..., None] * gap - self.mean)).sum(1)

    def tilted(self, reward: Quadratic, beta: float) -> Mixture:
        """The law p(x) exp(r(x) / beta), normalized."""
        slope, curve, own = reward.slope.to(self.mean.dtype) / beta, reward.curve / beta, self.variance
        precision = 1 / own + curve
        if bool((precision <= 0).any()):
            raise ValueError(
                f"curve={reward.curve} over beta={beta} outgrows the target: there is no optimum"
            )
        mean = (self.mean / own[:, None] + slope) / precision[:, None]
        gain = precision * mean.square().sum(1) - self.mean.square().sum(1) / own
        evidence = self.weight.log() + gain / 2 - self.mean.shape[1] / 2 * (own * precision).log()
        return Mixture(evidence.softmax(0), mean, 1 / precision)


def reweighted(mass: Tensor, values: Tensor, beta: float) -> Tensor:
    """The optimal masses [K] ~ mass exp(values / beta) where a reward has one value for each of K kinds."""
    return (mass.log() + values / beta).softmax(0)


class MixtureVelocity(nn.Module):
    """The exact velocity of a mixture whose parameters are trained: K (D + 2) numbers."""

    def __init__(self, target: Mixture) -> None:
        super().__init__()
        self.mean = nn.Parameter(target.mean.clone())
        self.log_variance = nn.Parameter(target.variance.log())
        self.logit = nn.Parameter(target.weight.log())

    @property
    def law(self) -> Mixture:
        """The mixture whose velocity this is; gradients flow."""
        return Mixture(self.logit.softmax(0), self.mean, self.log_variance.exp())

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.law.velocity(x, sigma)

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the parameters as the policy reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.detach().cpu() for name, p in (state_dict or self.state_dict()).items()}
        save_file(state, folder / "model.safetensors")


class GaussianWorld:
    """A mixture as the adapter of a flow policy; latents are [n, D, 1, 1], media the same in [0, 1]."""

    lora_targets: tuple[str, ...] = ()
    component = "transformer"
    scale = 1

    def __init__(self, target: Mixture) -> None:
        self.target, self.network = target, MixtureVelocity(target)
        self.pipeline = SimpleNamespace(components={})

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        return (self.target.mean.shape[1], 1, 1)

    def encode(self, text: str) -> Mapping[str, Tensor]:
        return {"nothing": torch.zeros(1)}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def rows(self, guidance: float) -> int:
        return 1

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        guidance: float,
    ) -> Tensor:
        velocity: Tensor = network(x.flatten(1), sigma)
        return velocity.reshape(x.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / (2 * BOX) + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        return (media - 0.5) * (2 * BOX)


def points(media: Tensor) -> Tensor:
    """The points [n, D] that media show."""
    return (media.flatten(1) - 0.5) * (2 * BOX)
