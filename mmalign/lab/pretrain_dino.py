"""Trains the lab's vision transformer on pictures alone, by self-distillation: DINO.

    loss = mean over views v != u of  H( SK(t(u) / tau_t),  softmax(s(v) / tau_s) )

t, the teacher, is the moving average of the student s, and sees the two large crops only (Caron et al. 2021,
arXiv:2104.14294); SK makes its outputs use all prototypes alike, by Sinkhorn-Knopp in place of a moving
center (as DINOv2, arXiv:2304.07193). We differ in the views: colors and sides tell things apart in the lab,
so crops are neither flipped nor recolored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import affine_grid, grid_sample, normalize

from mmalign.lab.pretrain_clip import as_floats
from mmalign.lab.pretrain_data import Styled, draw_styled
from mmalign.lab.pretrain_loop import Schedule, Stage, split_optimizers
from mmalign.lab.vit import ViT, ViTSize, normalized

LARGE, SMALL = (0.7, 1.0), (0.35, 0.6)  # side of a crop as a share of the picture's
SMALL_PIXELS = 32
STUDENT, COLD, WARM, WARMING = 0.1, 0.04, 0.06, 150  # temperatures; steps over which the teacher's rises
ROUNDS = 3  # of Sinkhorn-Knopp
DAMAGED = 0.3  # share of training pictures that are damaged, so that damage is something to see


@dataclass(frozen=True)
class DinoTraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    scenes: int = 12_000  # drawn for training
    steps: int = 500
    batch: int = 64
    locals: int = 2  # small crops of each picture
    prototypes: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.04
    momentum: float = 0.99  # of the teacher; raise it for longer trainings
    precision: str = "bf16"  # fp32 where the processor does not compute in bf16
    seed: int = 0
    save_every: int = 200
    size: ViTSize = field(default_factory=ViTSize)


class Head(nn.Module):
    """From a class token to scores of prototypes, cosines."""

    def __init__(self, width: int, prototypes: int, hidden: int = 256, bottleneck: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, token: Tensor) -> Tensor:
        return normalize(self.mlp(token), dim=-1) @ normalize(self.prototypes, dim=-1).T


def balanced(scores: Tensor, temperature: float) -> Tensor:
    """Shares of prototypes for each row, [N, K] from [N, K]; over the batch all prototypes get alike much."""
    share = ((scores - scores.max()) / temperature).exp()
    for _ in range(ROUNDS):
        share = share / share.sum(0, keepdim=True)
        share = share / share.sum(1, keepdim=True)
    return share


def distill(student: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of every view of the student to every large one of the teacher, itself left out.

    student: scores [V, B, K], the large views first. target: shares [T, B, K] of the large views.
    """
    log_prob = (student / STUDENT).log_softmax(-1)
    pairs = [(u, v) for u in range(len(target)) for v in range(len(student)) if u != v]
    return torch.stack([-(target[u] * log_prob[v]).sum(-1).mean() for u, v in pairs]).mean()


def crops(images: Tensor, side: tuple[float, float], pixels: int, generator: torch.Generator) -> Tensor:
    """One random square of each picture, [B, 3, pixels, pixels], with a little noise."""
    scale = side[0] + (side[1] - side[0]) * torch.rand(len(images), generator=generator)
    shift = (2 * torch.rand(2, len(images), generator=generator) - 1) * (1 - scale)
    zero = torch.zeros_like(scale)
    theta = torch.stack([scale, zero, shift[0], zero, scale, shift[1]], 1).reshape(-1, 2, 3)
    grid = affine_grid(theta, [len(images), 3, pixels, pixels], align_corners=False)
    found = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    gain = 1 + 0.1 * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1)
    noise = 0.02 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return gain * found + noise * torch.randn(found.shape, generator=generator)


def train_dino(config: DinoTraining, out: Path) -> dict[str, Any]:
    """Trains on drawn scenes, writes the teacher to `out/dino`, and gives what `measure_dino` says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vit = ViT(config.size)
        head = Head(config.size.embed_dim, config.prototypes)
    modules = {"vit": vit, "head": head}
    data = draw_styled(config.scenes, config.seed + 1, damaged=DAMAGED)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(data.pictures), (config.batch,), generator=generator)
        images = normalized(as_floats(data.pictures[picked]))
        large = torch.cat([crops(images, LARGE, config.size.img_size, generator) for _ in range(2)])
        small = torch.cat([crops(images, SMALL, SMALL_PIXELS, generator) for _ in range(config.locals)])
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            tokens = torch.cat([vit(large)[0], vit(small)[0]]).float()
            with torch.no_grad():
                taught = functional_call(vit, of(stage, "vit"), (large,))[0].float()
        student = head(tokens).reshape(2 + config.locals, config.batch, -1)
        with torch.no_grad():
            teacher = functional_call(head, of(stage, "head"), (taught,))
            temperature = COLD + (WARM - COLD) * min(1.0, step / WARMING)
            target = balanced(teacher, temperature).reshape(2, config.batch, -1)
            # exp of entropies: how many prototypes the student uses in all (1 is collapse), and per picture.
            said = (student[:2] / STUDENT).softmax(-1)
            used = torch.special.entr(said.mean((0, 1))).sum().exp()
            each = torch.special.entr(said).sum(-1).mean().exp()
        return distill(student, target), {"used": used.item(), "each": each.item()}

    optimizers = split_optimizers(modules, config.lr, config.weight_decay)
    schedule = Schedule(config.steps, warmup=min(50, config.steps), decay=config.steps // 2)
    stage = Stage(
        "dino", out, modules, optimizers, schedule, loss, config.seed, config.momentum, config.save_every
    )
    stage.run()
    vit.save(out / "dino")
    return measure_dino(ViT.load(out / "dino"))


def of(stage: Stage, name: str) -> dict[str, Tensor]:
    """The averaged parameters of one module: the teacher."""
    head = f"{name}."
    return {
        key.removeprefix(head): value for key, value in stage.average.values.items() if key.startswith(head)
    }


@torch.no_grad()
def measure_dino(vit: ViT, known: int = 3000, asked: int = 1000, seed: int = 0) -> dict[str, Any]:
    """k-nearest-neighbor accuracy on held-out scenes, in percent, by what is asked.

    Each is measured for the class token, for a transformer of the same shape with random weights, and for
    the pixels themselves.
    """
    base = draw_styled(known, seed + 2000, "train", DAMAGED)
    test = draw_styled(asked, seed + 3000, "heldout", DAMAGED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ViT(vit.size)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "dino": lambda pictures: tokens_of(vit, pictures),
        "random": lambda pictures: tokens_of(fresh, pictures),
        "pixels": lambda pictures: as_floats(pictures).flatten(1),
    }
    found: dict[str, Any] = {}
    for name, features in views.items():
        there, here = features(base.pictures), features(test.pictures)
        found[name] = {
            question: knn_accuracy(there, answers(base, question), here, answers(test, question))
            for question in ("shape", "color", "count", "style", "damage")
        }
    return found


def tokens_of(vit: ViT, pictures: Tensor, batch: int = 250) -> Tensor:
    """Class tokens [N, D] of pictures uint8 [N, S, S, 3]."""
    return torch.cat([vit(normalized(as_floats(part)))[0] for part in torch.split(pictures, batch)])


def answers(data: Styled, question: str) -> list[str]:
    """What is true of each picture; "" where the question makes no sense."""
    if question == "style":
        return data.styles
    if question == "damage":
        return ["damaged" if kind else "clean" for kind in data.damage]
    if question == "count":
        return [str(len(scene.things)) if scene.things else "" for scene in data.scenes]
    single = [scene.things[0] if len(scene.things) == 1 else None for scene in data.scenes]
    return [str(getattr(thing, question)) if thing else "" for thing in single]


def knn_accuracy(
    base: Tensor, known: Sequence[str], test: Tensor, wanted: Sequence[str], k: int = 10
) -> float:
    """Share of test rows, in percent, whose k nearest base rows by cosine mostly bear the right label.

    Rows labeled "" are left out.
    """
    here = [i for i, label in enumerate(known) if label]
    there = [i for i, label in enumerate(wanted) if label]
    labels = sorted({known[i] for i in here})
    number = torch.tensor([labels.index(known[i]) for i in here])
    center = base[here].mean(0)
    cosines = normalize(test[there] - center, dim=-1) @ normalize(base[here] - center, dim=-1).T
    weight, nearest = cosines.topk(k, 1)
    votes = torch.zeros(len(there), len(labels)).scatter_add_(1, number[nearest], (weight / 0.07).exp())
    right = [labels[int(best)] == wanted[i] for best, i in zip(votes.argmax(1), there, strict=True)]
    return 100 * sum(right) / len(right)
