"""What an artifact detector learns from, how it learns, and how good it is.

A set is a folder with labels.jsonl, one picture a line:

    {"file": "0001.png", "artifact": true, "kind": "seams", "mask": "0001_mask.png", "seen": true}

kind, mask and seen may be left out: of pictures that somebody labeled, only whether there is an artifact is
known. The mask is white where the damage is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, max_pool2d
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from mmalign.pictures import open_picture
from mmalign.rewardmodels.artifact import Detector
from mmalign.rewardmodels.training_state import Row, TrainingState, fingerprint

LABELS = "labels.jsonl"
SLIGHT = 0.1  # share of a place from which it counts as damaged


def fresh_tower(folder: Path, side: int = 128, widths: Sequence[int] = (32, 64, 128), seed: int = 0) -> None:
    """Writes a small ResNet without training: damage is local, and convolutions find it with few pictures.

    It sees squares of `side` pixels and gives a map of side / 16 places a side with three stages.
    """
    from transformers import ResNetConfig, ResNetModel

    settings = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=list(widths), depths=[2] * len(widths), layer_type="basic"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ResNetModel(settings).save_pretrained(folder)
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2) + "\n")


@dataclass(frozen=True)
class Labeled:
    """images: uint8 [N, 3, S, S]. artifact: [N] bool. masks: [N, S, S] bool, known where located: [N] bool.

    kinds: "" for artifact-free. seen: [N] bool, whether a detector may be trained on that kind.
    """

    images: Tensor
    artifact: Tensor
    masks: Tensor
    located: Tensor
    kinds: list[str]
    seen: Tensor


def read_labeled(folder: Path) -> Labeled:
    """The set in a folder; ValueError names the line that is wrong."""
    import numpy as np

    file = folder / LABELS
    if not file.is_file():
        raise ValueError(f"{folder}: has no {LABELS}; scripts/artifacts.py make writes one")
    images: list[Any] = []
    masks, rows = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row.get("artifact"), bool) or not isinstance(row.get("file"), str):
            raise ValueError(f"{file}:{number}: needs a file, and artifact true or false")
        picture = np.array(open_picture(folder / row["file"]))
        if images and picture.shape != images[0].shape:
            raise ValueError(
                f"{file}:{number}: {picture.shape[:2]} pixels, the first has {images[0].shape[:2]}"
            )
        mask = np.zeros(picture.shape[:2], bool)
        if row.get("mask"):
            mask = np.array(open_picture(folder / row["mask"]))[..., 0] > 127
        images.append(picture)
        masks.append(mask)
        rows.append(row)
    artifact = torch.tensor([row["artifact"] for row in rows])
    if not len(rows) or artifact.all() or not artifact.any():
        raise ValueError(f"{file}: needs pictures with artifacts and without")
    return Labeled(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        artifact,
        torch.from_numpy(np.stack(masks)),
        torch.tensor([not row["artifact"] or bool(row.get("mask")) for row in rows]),
        [row.get("kind", "given" if row["artifact"] else "") for row in rows],
        torch.tensor([row.get("seen", True) for row in rows]),
    )


def train_detector(
    detector: Detector,
    data: Labeled,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 1e-3,
    frozen: bool = False,
    precision: str = "fp32",
    seed: int = 0,
    log: Callable[[Row], None] = lambda row: None,
    folder: Path | None = None,
    every: int = 100,
) -> Detector:
    """Teaches the heads, and the tower unless it is frozen; then fits the temperature on a tenth held back.

    Half of a batch is damaged. Pictures are enlarged, blurred, brightened and made noisy a little, damaged or
    not, so that the blur of an autoencoder and the size of a thing are no artifacts.

    folder: of the checkpoint, written every `every` steps, from which a killed run goes on exactly; `log` is
    then first told of the steps that were done. ValueError where it was begun with other settings or data.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = data.seen.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)]
    held, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    sides = rows[data.artifact[rows]], rows[~data.artifact[rows]]
    device = detector.mix.device
    detector.requires_grad_(True).network.requires_grad_(not frozen)
    learned = [p for p in detector.parameters() if p.requires_grad]
    matrices, rest = ([p for p in learned if (p.ndim == 2) is flat] for flat in (True, False))
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr, weight_decay=0.0),
    ]
    detector.train()
    begun: dict[str, object] = {"steps": steps, "batch": batch, "lr": lr, "frozen": frozen}
    begun |= {"precision": precision, "seed": seed, "weights": fingerprint(detector.state_dict().values())}
    begun["data"] = fingerprint([data.images, data.artifact, data.masks, data.located, data.seen])
    state = TrainingState(folder, begun, [*learned, *detector.buffers()], optimizers, generator, every)
    done = state.load()
    for row in done:
        log(row)
    for step in range(len(done), steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        picked = torch.cat(
            [side[torch.randint(len(side), (batch // 2,), generator=generator)] for side in sides]
        )
        images, masks = disturbed(
            data.images[picked].float() / 255, data.masks[picked], data.artifact[picked], generator
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            whole, places = detector(images.to(device))
        whole, places = whole.float(), places.float()
        wanted = data.artifact[picked].float().to(device)
        damaged = places_of(masks, detector.rows).to(device)
        known = data.located[picked].to(device)
        loss = cross_entropy(whole, wanted) + cross_entropy(places[known], damaged[known])
        detector.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        right = ((whole > 0) == (wanted > 0)).float().mean().item()
        done.append({"step": step + 1, "loss": loss.item(), "right": right})
        state.save(done, last=step + 1 == steps)
        log(done[-1])
    detector.eval().requires_grad_(False)
    logits = logits_of(detector, data.images[held])
    detector.temperature = fit_temperature(logits, data.artifact[held])
    return detector


def disturbed(
    images: Tensor, masks: Tensor, artifact: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A part of each picture, a little blur, gain and noise, and a mirror for half, drawn for each.

    Parts are enlarged by up to a half: things of a size that training never showed are no artifacts.
    """
    images, masks = enlarged(images, masks, artifact, generator)
    count = (len(images), 1, 1, 1)
    soft = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images + 0.6 * torch.rand(count, generator=generator) ** 2 * (soft - images)
    images = images * (0.95 + 0.1 * torch.rand(count, generator=generator))
    noise = 0.02 * torch.rand(count, generator=generator)
    images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    turned = torch.rand(len(images), generator=generator) < 0.5
    return (
        torch.where(turned[:, None, None, None], images.flip(-1), images),
        torch.where(turned[:, None, None], masks.flip(-1), masks),
    )


def enlarged(
    images: Tensor, masks: Tensor, artifact: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A square part of each picture [n, 3, S, S] and of its mask [n, S, S], at the size of the whole.

    Pictures whose damage would be lost for the most part, or lies nobody knows where, stay whole.
    """
    share = 1 - torch.rand(len(images), 1, generator=generator) / 3
    middle = (1 - share) * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    across = torch.diag_embed(share.expand(-1, 2))
    grid = affine_grid(torch.cat([across, middle[..., None]], 2), list(images.shape), align_corners=False)
    parts = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    found = grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0] > 0.5
    had, kept = (m.flatten(1).sum(1) for m in (masks, found))
    whole = (artifact & (2 * kept * share[:, 0] ** 2 <= had))[:, None, None]
    return torch.where(whole[:, None], images, parts), torch.where(whole, masks, found)


def places_of(masks: Tensor, rows: int) -> Tensor:
    """Which places are damaged, [n, rows * rows] in {0, 1}, by masks [n, S, S] of pixels."""
    share = interpolate(masks[:, None].float(), (rows, rows), mode="area")
    return (share.flatten(1) >= SLIGHT).float()


@torch.no_grad()
def logits_of(detector: Detector, images: Tensor, batch: int = 256) -> Tensor:
    """Logits of damage [N] for pictures uint8 [N, 3, S, S], on the CPU."""
    device = detector.mix.device
    return torch.cat(
        [detector(part.to(device).float() / 255)[0].cpu() for part in torch.split(images, batch)]
    )


def fit_temperature(logits: Tensor, artifact: Tensor) -> float:
    """The temperature with the least cross-entropy, of 0.2 to 20 (Guo et al. 2017, arXiv:1706.04599)."""
    grid = torch.logspace(-0.7, 1.3, 81).double()
    losses = [cross_entropy(logits.double() / heat, artifact.double()) for heat in grid]
    return float(grid[int(torch.stack(losses).argmin())])


def auc(damaged: Tensor, free: Tensor) -> float:
    """Chance that a damaged picture has the higher logit, ties half: the area under the ROC curve."""
    return (((damaged[:, None] - free).sign() + 1) / 2).mean().item()


def calibration_error(probability: Tensor, truth: Tensor, bins: int = 10) -> float:
    """Expected calibration error: gap of confidence and share of truth, over bins of alike confidence."""
    place = (probability * bins).long().clamp(max=bins - 1)
    gaps = [
        (probability[place == b].mean() - truth[place == b].float().mean()).abs()
        * (place == b).float().mean()
        for b in range(bins)
        if (place == b).any()
    ]
    return float(torch.stack(gaps).sum())


def evaluate_detector(detector: Detector, data: Labeled) -> dict[str, Any]:
    """AUC in all and by kind, each against all artifact-free pictures, and calibration.

    seen, unseen: kinds that detectors may be trained on, and others. pointing: share of damaged pictures, of
    those with masks, whose most suspect place is damaged.
    """
    logits = logits_of(detector, data.images)
    free = logits[~data.artifact]
    kinds = {kind: torch.tensor([k == kind for k in data.kinds]) for kind in sorted({*data.kinds} - {""})}
    found: dict[str, Any] = {"pictures": len(logits), "kinds": {}}
    for name, group in (("seen", data.seen & data.artifact), ("unseen", ~data.seen & data.artifact)):
        if not group.any():
            continue
        probability = (torch.cat([logits[group], free]) / detector.temperature).sigmoid()
        truth = torch.cat([torch.ones(int(group.sum())), torch.zeros(len(free))])
        found[name] = {
            "auc": auc(logits[group], free),
            "ece": calibration_error(probability, truth),
            "accuracy": ((probability > 0.5) == (truth > 0)).float().mean().item(),
        }
        rows = (group & data.located).nonzero()[:, 0]
        if len(rows):
            found[name]["pointing"] = pointing(detector, data.images[rows], data.masks[rows])
    for kind, group in kinds.items():
        found["kinds"][kind] = {"seen": bool(data.seen[group].all()), "auc": auc(logits[group], free)}
    return found


@torch.no_grad()
def pointing(detector: Detector, images: Tensor, masks: Tensor) -> float:
    """Share of pictures whose most suspect place is damaged."""
    device, rows = detector.mix.device, detector.rows
    places = torch.cat([detector(p.to(device).float() / 255)[1].cpu() for p in torch.split(images, 256)])
    touched = max_pool2d(masks[:, None].float(), masks.shape[-1] // rows).flatten(1)
    return touched.gather(1, places.argmax(1, keepdim=True)).mean().item()


def table(found: dict[str, Any]) -> str:
    """What `evaluate_detector` found, to read."""
    lines = [f"{found['pictures']} pictures"]
    for name in ("seen", "unseen"):
        if name in found:
            figures = ", ".join(f"{key} {value:.3f}" for key, value in found[name].items())
            lines.append(f"kinds {name}: {figures}")
    rows: Sequence[tuple[str, Any]] = sorted(found["kinds"].items(), key=lambda kind: not kind[1]["seen"])
    lines += [
        f"  {kind:16}{'seen  ' if row['seen'] else 'unseen'}  auc {row['auc']:.3f}" for kind, row in rows
    ]
    return "\n".join(lines)
