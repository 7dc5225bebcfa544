"""Adv-GRPO: a critic that is trained against the policy to know reference pictures (arXiv:2511.20256).

    R(x) = (1 - l) h(f_0(x)) + l mean_j h(f_j(x))
    L    = L_h(f_0) + l L_h(f_j),    hinge: L_h = 1/2 E max(0, 1 - h(x_r)) + 1/2 E max(0, 1 + h(x_g))

f_0: features of the whole picture, f_j: of its places, by a frozen network; h: one small head for both; x_r:
references, x_g: samples. Where the policy finds a flaw of the critic, the critic learns that it is one.

Unlike the public code: every rollout trains the policy and the critic, where there nine of ten train the
critic alone; features have one length in training and in scoring; old samples stay in a buffer; a critic
that knows references less surely after a lesson than before it goes back to what it was (after Cooper,
arXiv:2508.05613), measured on anchors, samples and references that it never learns from, and on a quarter of
the fresh samples, held back; a step with a NaN is not made. Scoring looks at all places, not at a
draw.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, softplus

from mmalign.pictures import STILLS, listed, open_picture, stills_in
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.conse import CPU_BATCH
from mmalign.rewardmodels.features import Classifier, Tower, load_features
from mmalign.rewardmodels.inputs import pictures
from mmalign.rewardmodels.precisions import Precision, dtype_of

Loss = Literal["hinge", "logistic", "pairwise"]
LEAST = 8  # references; a quarter of them are anchors
SMALLEST = 0.1  # distance of the anchors' means below which values are not stretched any further
SURE, UNSURE = 0.99, 0.55  # accuracies from which, and up to which, a critic has no gradient to offer
ALARM = 20  # lessons in a row at one of the two after which a warning is said
FLAT = 1e-4  # deviation of the rewards of fresh samples up to which they are all one: what credit adds to it
TILE = 8  # pixels a side that `pixels` keeps of a picture, and of each of its 4 x 4 tiles


@dataclass(eq=False)
class Adversarial:
    """How much a picture looks like the references, to a critic that learns; blind to the prompt.

    0 is the mean of the held-out samples of the first iteration, 1 that of the held-out references, both as
    the critic of the moment sees them; 0 for all before its first lesson. The network runs where the pictures
    are, the head on the CPU. All ranks learn from the samples of all ranks, and so the same.
    """

    # Folder (also of .tar shards), zip or .tar of pictures to look like; of another style to transfer it.
    references: str
    features: str = "efficientnet"  # what the critic sees: pixels, efficientnet, or a model (see features.py)
    # Of the features' network; bf16 or fp16 are faster on a GPU. The head, and its training, stay in fp32.
    precision: Precision = "fp32"
    loss: Loss = "hinge"  # hinge stops at a margin, logistic never does, pairwise compares one with one
    local: float = 0.3  # weight of places beside the whole; raise it where flaws are small
    patches: int = 16  # places that are kept of a picture to learn from; more take more memory
    width: int = 512  # of the head
    learning_rate: float = 3e-4  # of the head; lower it where fresh_accuracy stays at 1
    weight_decay: float = 1e-2  # of the head
    updates: int = 20  # of the head in an iteration; lower it where fresh_accuracy stays at 1
    every: int = 1  # iterations between two lessons; samples of all are kept
    # The critic learns only while it tells fresh samples from references no more surely than this; 1: always.
    enough: float = 1.0
    batch: int = 64  # references, and as many samples, in an update of the head
    fresh: float = 0.5  # share of the samples of a batch that are of this iteration, not of the buffer
    buffer: int = 512  # past samples that are kept; 0: none
    anchors: int = 32  # references, and samples of the first iteration, that are never learned from
    # Loss of accuracy on the anchors and on fresh samples held back, in the mean, that undoes a lesson.
    tolerance: float = 0.1
    seed: int = 0  # of the head, of which pictures are anchors, and of all draws
    name = "adversarial"

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"adversarial: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        for setting in ("width", "updates", "every", "batch", "anchors"):
            if getattr(self, setting) < 1:
                raise ValueError(f"adversarial: {setting} must be at least 1, got {getattr(self, setting)}")
        for setting in ("local", "enough", "fresh", "tolerance"):
            if not 0 <= getattr(self, setting) <= 1:
                raise ValueError(f"adversarial: {setting} must lie in [0, 1], got {getattr(self, setting)}")
        for setting in ("buffer", "weight_decay"):
            if getattr(self, setting) < 0:
                raise ValueError(f"adversarial: {setting} must not be negative, got {getattr(self, setting)}")
        if not self.learning_rate > 0:
            raise ValueError(f"adversarial: learning_rate must be positive, got {self.learning_rate}")
        if (self.patches == 0) != (self.local == 0) or self.patches < 0:
            raise ValueError(
                "adversarial: patches and local are both 0 or both positive, got "
                f"{self.patches}, {self.local}"
            )
        self._files = files_of(self.references)
        for file in self._files:
            open_picture(file)  # one that cannot be read is found now
        self._dtype = dtype_of(self.name, self.precision)
        self._device = torch.device("cpu")
        self._backbone = backbone(self.features, self._device, self._dtype)
        with torch.no_grad():
            dims = self._tokens(torch.zeros(1, 3, 64, 64)).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.head = nn.Sequential(nn.Linear(dims, self.width), nn.GELU(), nn.Linear(self.width, 1))
        for parameter in self.head[2].parameters():
            nn.init.zeros_(parameter)
        self._optimizer = torch.optim.AdamW(
            self.head.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        self._random = torch.Generator().manual_seed(self.seed)
        self._zero, self._unit = 0.0, 1.0
        self._fits, self._sure, self._unsure = 0, 0, 0
        self._warned: set[str] = set()
        self._past, self._anchors = torch.zeros(0), torch.zeros(0)  # [n, 1 + patches, D]
        self._real: tuple[Tensor, Tensor] | None = None  # references to learn from, and anchors

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        score = self.score(self._tokens(pictures(self.name, outcome)))
        return RewardSignal(self.name, ((score - self._zero) / self._unit)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The reward [B * views]; gradients reach the media, and not the critic."""
        self.head.requires_grad_(False)
        try:
            score = self.score(self._tokens(pictures(self.name, outcome, graph=True)))
        finally:
            self.head.requires_grad_(True)
        return (score - self._zero) / self._unit

    def score(self, tokens: Tensor) -> Tensor:
        """R [n] of features [n, 1 + places, D], before it is brought to a scale."""
        said: Tensor = self.head(tokens)[..., 0]
        if not self.local:
            return said[:, 0]
        return (1 - self.local) * said[:, 0] + self.local * said[:, 1:].mean(1)

    def fit(self, outcome: Outcome) -> dict[str, float]:
        """Learn to tell the samples of all ranks, and earlier ones, from the references.

        Accuracies are chances that a reference is scored above a sample: fresh_accuracy of the samples of
        this iteration before they were learned from (with held-out references), anchor_accuracy after it;
        reached_accuracy is the mean over the anchors and those samples of this iteration that the lesson has
        held back, right after it, and undone whether that was too little.
        sure_for, unsure_for: iterations in a row in which the first was nearly 1 (the critic is too strong to
        say which flaw is the lesser), or at most nearly a half (it is lost, or the policy has arrived).
        fresh_spread: standard deviation of the scores of this iteration's samples before it.
        A RuntimeWarning, each said once: either of the two for ALARM iterations, or samples that all get the
        same reward after the first.
        """
        with torch.no_grad():
            fresh, anchors = self._gathered(outcome), self._references(outcome)[1]
            if not len(self._anchors):
                held = torch.arange(len(fresh)) % 4 == 0
                self._anchors = fresh[held][: self.anchors]
                fresh = torch.cat([fresh[~held], fresh[held][self.anchors :]])
            before = self.score(fresh)
            known = accuracy(self.score(anchors), before)
        self._fits += 1
        self._sure = self._sure + 1 if known >= SURE else 0
        self._unsure = self._unsure + 1 if known <= UNSURE else 0
        spread = before.std(correction=0).item()
        self._alarm(spread)
        metrics = {
            "fresh_accuracy": known,
            "fresh_spread": spread,
            "sure_for": float(self._sure),
            "unsure_for": float(self._unsure),
            "trained": 0.0,
        }
        if (self._fits - 1) % self.every == 0 and known <= self.enough:
            metrics |= self._learn(fresh)
        with torch.no_grad():
            metrics["anchor_accuracy"] = accuracy(self.score(anchors), self.score(self._anchors))
        self._remember(fresh)
        return metrics | {"buffer": float(len(self._past))}

    def _alarm(self, spread: float) -> None:
        """Say what a policy cannot learn from, and what mends it."""
        tells = "the critic of reward 'adversarial'"
        alarms = {
            "sure": (
                self._sure >= ALARM,
                f"{tells} has known nearly all samples from references for {self._sure} iterations in a row "
                f"(fresh_accuracy of {SURE} or more), so that it hardly tells which sample is better. Lower "
                "its learning_rate or updates, raise every, or set enough below 1.",
            ),
            "unsure": (
                self._unsure >= ALARM,
                f"{tells} has not known samples from references for {self._unsure} iterations in a row "
                f"(fresh_accuracy of {UNSURE} or less). Where the pictures look right, the policy has "
                "arrived and can stop. Where they do not, raise its updates or learning_rate, give it more "
                "references, or features that see the difference.",
            ),
            "flat": (
                self._fits > 1 and spread <= FLAT * self._unit,  # before the first lesson all have 0
                f"{tells} gives all samples of an iteration the same reward (fresh_spread {spread:.2g}), and "
                "nothing is learned from it. Where the pictures are all alike, the policy has collapsed: "
                "go back to an earlier checkpoint with a lower training.learning_rate. Where they are not, "
                "raise its updates or learning_rate, or choose features that see how they differ.",
            ),
        }
        for alarm, (rings, said) in alarms.items():
            if rings and alarm not in self._warned:
                self._warned.add(alarm)
                warnings.warn(f"{said} Said once, logged throughout.", RuntimeWarning, stacklevel=3)

    def _learn(self, fresh: Tensor) -> dict[str, float]:
        """So many updates of the head, undone where it knows less than before.

        Anchors alone would not do for that: as samples move, what tells them from references moves too, and a
        critic that may not forget the first samples a little could never follow.
        """
        assert self._real is not None  # read before
        real, anchors = self._real
        back = torch.arange(len(fresh)) % 4 == 0
        held, fresh = fresh[back], fresh[~back]

        def known() -> float:
            with torch.no_grad():
                one = self.score(anchors)
                return sum(accuracy(one, self.score(x)) for x in (self._anchors, held)) / 2

        before = known()
        saved = deepcopy((self.head.state_dict(), self._optimizer.state_dict()))
        losses, skipped = [], 0
        for _ in range(self.updates):
            ours = self._drawn(real, self.batch)
            count = round(self.fresh * self.batch) if len(self._past) else self.batch
            theirs = self._drawn(fresh, count)
            if count < self.batch:
                theirs = torch.cat([theirs, self._drawn(self._past, self.batch - count)])
            loss = self._loss(ours, theirs)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if all(p.grad is not None and p.grad.isfinite().all() for p in self.head.parameters()):
                self._optimizer.step()
                losses.append(loss.item())
            else:
                skipped += 1
        self._optimizer.zero_grad(set_to_none=True)
        reached = known()
        worse = reached < before - self.tolerance
        if worse:
            self.head.load_state_dict(saved[0])
            self._optimizer.load_state_dict(saved[1])
        else:
            with torch.no_grad():
                one, zero = self.score(anchors), self.score(self._anchors)
            self._zero = zero.mean().item()
            self._unit = max(one.mean().item() - self._zero, SMALLEST)
        return {
            "trained": 1.0,
            "loss": sum(losses) / len(losses) if losses else float("nan"),
            "reached_accuracy": reached,
            "undone": float(worse),
            "skipped": float(skipped),
        }

    def _loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        real, made = self.head(ours)[..., 0], self.head(theirs)[..., 0]
        judge = LOSSES[self.loss]
        whole = judge(real[:, 0], made[:, 0])
        return whole + self.local * judge(real[:, 1:], made[:, 1:]) if self.local else whole

    def _drawn(self, bank: Tensor, count: int) -> Tensor:
        return bank[torch.randint(len(bank), (count,), generator=self._random)]

    def _remember(self, fresh: Tensor) -> None:
        """The buffer keeps a random part of what it had and what is new, each lot with equal chances."""
        every = torch.cat([self._past, fresh]) if len(self._past) else fresh
        keep = torch.randperm(len(every), generator=self._random)[: self.buffer]
        self._past = every[keep.sort().values]

    # What it looks at.

    def _tokens(self, images: Tensor) -> Tensor:
        """Features of length sqrt(D) each, on the CPU: [n, 1 + places, D], without places [n, 1, D].

        Pictures are rounded to 256 levels, as files are, so that nothing finer tells samples from references.
        """
        if images.device != self._device:
            self._device = images.device
            self._backbone = backbone(self.features, self._device, self._dtype)
        images = images + ((images * 255).round() / 255 - images).detach()  # gradients pass the rounding
        size = CPU_BATCH if images.device.type == "cpu" else self.batch
        parts = [self._backbone(part) for part in torch.split(images, size)]
        found = torch.cat([part if self.local else part[:, :1] for part in parts]).cpu()
        unit: Tensor = normalize(found, dim=-1)
        return unit * math.sqrt(found.shape[-1])

    def _references(self, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """Features of references at the size of the samples: to learn from, and anchors. Read once."""
        if self._real is None:
            images = pictures(self.name, outcome)[:1]
            random = torch.Generator().manual_seed(self.seed)
            found = []
            for file in self._files:
                tokens = self._tokens(fitted(file, images.shape[-2], images.shape[-1]).to(images.device))
                found.append(thinned(tokens, self.patches, random))
            every = torch.cat(found)[torch.randperm(len(found), generator=random)]
            held = min(self.anchors, len(every) // 4)
            self._real = every[held:], every[:held]
        return self._real

    def _gathered(self, outcome: Outcome) -> Tensor:
        """Features of the samples of all ranks, in the order of their names."""
        tokens = thinned(self._tokens(pictures(self.name, outcome)), self.patches, self._random)
        prompts, views = outcome.prompts, outcome.views
        rows = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
        names = [(*row, view) for row in rows for view in range(views)]
        if dist.is_available() and dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (names, tokens))
            names = [name for part, _ in parts for name in part]
            tokens = torch.cat([part for _, part in parts])
        return tokens[torch.tensor(sorted(range(len(names)), key=names.__getitem__))]

    # To go on as if nothing had happened.

    def state_dict(self) -> dict[str, object]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.get_state(),
            "past": self._past,
            "anchors": self._anchors,
            "scale": [self._zero, self._unit],
            "counts": [self._fits, self._sure, self._unsure],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random.set_state(state["random"])
        self._past, self._anchors = state["past"], state["anchors"]
        self._zero, self._unit = state["scale"]
        self._fits, self._sure, self._unsure = state["counts"]


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """0 where all are beyond their margin of 1."""
    return ((1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()) / 2


def logistic(real: Tensor, made: Tensor) -> Tensor:
    """Minus the log-likelihood of the labels; its critic estimates the log ratio of the two densities."""
    return (softplus(-real).mean() + softplus(made).mean()) / 2


def pairwise(real: Tensor, made: Tensor) -> Tensor:
    """Minus the log-probability (Bradley-Terry) that each reference is preferred to the sample beside it."""
    return softplus(made - real).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge,
    "logistic": logistic,
    "pairwise": pairwise,
}


def accuracy(real: Tensor, made: Tensor) -> float:
    """Chance that a reference is scored above a sample, ties half: the area under the ROC curve."""
    return (((real[:, None] - made).sign() + 1) / 2).mean().item()


def thinned(tokens: Tensor, patches: int, random: torch.Generator) -> Tensor:
    """The whole and a draw of `patches` places, the same for all pictures: [n, 1 + patches, D]."""
    places = torch.randperm(tokens.shape[1] - 1, generator=random)[:patches].sort().values + 1
    return tokens[:, torch.cat([places.new_zeros(1), places])]


def backbone(features: str, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Pictures [n, 3, H, W] to the features of the whole and of places, [n, 1 + places, D].

    dtype: of its network, where it has one; the features are float32.
    """
    if features == "pixels":
        return tiles
    found = load_features(features, device, dtype)
    assert isinstance(found, Classifier | Tower)
    tokens: Callable[[Tensor], Tensor] = found.tokens
    return tokens


def tiles(images: Tensor) -> Tensor:
    """The picture and its 4 x 4 tiles, each at 8 x 8 pixels around mid-gray: [n, 17, 192]."""
    small = interpolate(images, (4 * TILE, 4 * TILE), mode="bilinear", antialias=True) - 0.5
    whole = interpolate(images, (TILE, TILE), mode="bilinear", antialias=True) - 0.5
    split = small.unfold(2, TILE, TILE).unfold(3, TILE, TILE)  # [n, 3, 4, 4, 8, 8]
    places = split.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return torch.cat([whole.flatten(1)[:, None], places], 1)


def files_of(references: str) -> list[Path]:
    """The pictures in a folder, zip or tar, by name; ValueError where there are too few.

    Of a folder with a metadata.jsonl those that it names and gives to no other split than train.
    """
    place = Path(references)
    if (place / "metadata.jsonl").is_file():
        found = sorted(set(listed(place, "train")))
    else:
        found = stills_in(place)
    if not found and not place.is_dir():
        raise ValueError(
            f"adversarial: references must be a folder, a zip or a .tar of pictures, got {references!r}"
        )
    if len(found) < LEAST:
        raise ValueError(
            f"adversarial: {references} holds {len(found)} pictures ({', '.join(STILLS)}), "
            f"and needs {LEAST} or more"
        )
    return found


def fitted(file: Path, height: int, width: int) -> Tensor:
    """The middle of a picture at a size of its samples, [1, 3, height, width] in [0, 1]."""
    from PIL import Image, ImageOps

    picture = ImageOps.fit(open_picture(file), (width, height), Image.Resampling.BICUBIC)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(1, height, width, 3).permute(0, 3, 1, 2).float() / 255
