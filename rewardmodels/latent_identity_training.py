"""What the latent identity reward learns from, how it learns, and how good it is at each noise level.

A set of one's own is a file of JSON lines, with paths from its folder:

    {"prompt": "a dog runs", "video": "clips.zip/0001", "reference_image": "dog.png", "kept": true}

Loss: binary cross-entropy of the label, with every latent noised to a level drawn uniformly,
z_t = (1 - t) z + t e. The denoiser's blocks and the head learn; its embeddings stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from mmalign.pictures import frames_of, missing, missing_video
from mmalign.rewardmodels.latent_identity import IdentityNetwork, LatentSpace, read_reference
from mmalign.rewardmodels.training_state import Row, TrainingState, fingerprint

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the buckets of noise levels that accuracy is told for


@dataclass(frozen=True)
class LabeledLatents:
    """latents: [N, C, f, h, w]; references: [N, C, 1, h, w]; text: [N, length, width]; kept: [N] bool.

    kinds: what is wrong with each, where that is known. nothing: [length, width], the empty text.
    """

    latents: Tensor
    references: Tensor
    text: Tensor
    kept: Tensor
    kinds: list[str]
    nothing: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def label_latents(
    space: LatentSpace,
    videos: Tensor,
    references: Tensor,
    texts: Sequence[str],
    kept: Sequence[bool],
    kinds: Sequence[str],
) -> LabeledLatents:
    """Encodes videos [N, F, 3, H, W] and references [N, 3, H, W], both uint8 or floats in [0, 1]."""

    def encoded(media: Tensor) -> Tensor:
        parts = torch.split(media, 64)
        return torch.cat([space.videos(p.float() / 255 if p.dtype == torch.uint8 else p) for p in parts])

    return LabeledLatents(
        encoded(videos),
        encoded(references[:, None]),
        space.texts(texts, videos.device),
        torch.tensor(list(kept)),
        list(kinds),
        space.texts([""], videos.device)[0],
    )


def read_labeled_videos(
    file: Path, space: LatentSpace, height: int, width: int, count: int
) -> LabeledLatents:
    """The set of a file, of videos of `count` frames fitted to a size; ValueError names the wrong line."""
    videos, references, rows = [], [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        place, row = f"{file}, line {number}", json.loads(line)
        named = [row.get(key) for key in ("prompt", "video", "reference_image")]
        if not all(isinstance(value, str) for value in named) or not isinstance(row.get("kept"), bool):
            raise ValueError(
                f"{place}: needs a prompt, a video (a folder of frames), a reference_image, and kept "
                "(true or false)"
            )
        video, still = (str(file.parent / str(name)) for name in named[1:])
        if lacking := missing_video(video) or missing(still):
            raise ValueError(f"{place}: {lacking}")
        names = frames_of(video)
        if names is None or len(names) != count:
            raise ValueError(f"{place}: the video must be a folder of {count} frames, got {video}")
        videos.append(torch.stack([read_reference(name, height, width) for name in names]))
        references.append(read_reference(still, height, width))
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: holds no videos")
    return label_latents(
        space,
        torch.stack(videos),
        torch.stack(references),
        [row["prompt"] for row in rows],
        [row["kept"] for row in rows],
        [str(row.get("kind", "")) for row in rows],
    )


def train_identity(
    network: IdentityNetwork,
    space: LatentSpace,
    data: LabeledLatents,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    blocks_lr: float = 1e-3,
    dropped: float = 0.1,
    seed: int = 0,
    log: Callable[[Row], None] = lambda row: None,
    folder: Path | None = None,
    every: int = 100,
) -> None:
    """Trains the blocks and the head in place; dropped: share of the texts that are left out.

    folder: of the checkpoint, written every `every` steps, from which a killed run goes on exactly; `log` is
    then first told of the steps that were done. ValueError where it was begun with other settings or data.
    """
    network.train().requires_grad_(False)
    blocks = list(network.transformer.blocks.requires_grad_(True).parameters())
    own = [p for name, p in network.named_parameters() if not name.startswith("transformer.")]
    for parameter in own:
        parameter.requires_grad_(True)
    groups = [{"params": own, "lr": lr}, {"params": blocks, "lr": blocks_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    warmup = min(100, steps)
    draw = torch.Generator().manual_seed(seed)
    begun: dict[str, object] = {"steps": steps, "batch": batch, "lr": lr, "blocks_lr": blocks_lr}
    begun |= {"dropped": dropped, "seed": seed, "weights": fingerprint(network.state_dict().values())}
    begun["data"] = fingerprint([data.latents, data.references, data.text, data.kept, data.nothing])
    state = TrainingState(folder, begun, [*own, *blocks], [optimizer], draw, every)
    done = state.load()
    for row in done:
        log(row)
    for step in range(len(done), steps):
        share = min((step + 1) / warmup, 2 * (steps - step) / steps, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        rows = torch.randint(len(data), (batch,), generator=draw)
        sigma = torch.rand(batch, generator=draw)
        noise = torch.randn((batch, *data.latents.shape[1:]), generator=draw)
        silent = torch.rand(batch, generator=draw) < dropped
        found = _asked(network, space, data, rows, sigma, noise, silent)
        wanted = data.kept[rows].float().to(found.device)
        loss = cross_entropy(found, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*own, *blocks], 1.0)
        optimizer.step()
        right = float(((found > 0) == (wanted > 0)).float().mean())
        done.append({"loss": loss.item(), "right": right})
        state.save(done, last=step + 1 == steps)
        log(done[-1])
    network.eval().requires_grad_(False)


@torch.no_grad()
def measure_identity(
    network: IdentityNetwork, space: LatentSpace, data: LabeledLatents, seed: int = 0
) -> list[dict[str, float]]:
    """For each bucket of noise levels: accuracy, that of each kind, and how often references are told apart.

    Levels are drawn uniformly inside the bucket. ordered: share of the kept videos whose own reference is
    given more than that of another kept video with another reference, under one noise.
    """
    network.eval()
    draw = torch.Generator().manual_seed(seed)
    everyone, found = torch.arange(len(data)), []
    kept = data.kept.nonzero()[:, 0]
    other = _another(data, kept)
    for low, high in pairwise(EDGES):
        sigma = low + (high - low) * torch.rand(len(data), generator=draw)
        noise = torch.randn(data.latents.shape, generator=draw)
        said = _in_parts(network, space, data, everyone, sigma, noise)
        right = ((said > 0) == data.kept).float()
        row = {"low": low, "high": high, "accuracy": float(right.mean())}
        for kind in dict.fromkeys(data.kinds):
            row[kind or "labeled"] = float(right[torch.tensor([k == kind for k in data.kinds])].mean())
        shuffled = replace(data, references=data.references.clone())
        shuffled.references[kept] = data.references[other]
        against = _in_parts(network, space, shuffled, kept, sigma[kept], noise[kept])
        row["ordered"] = float((said[kept] > against).float().mean())
        found.append(row)
    return found


def _another(data: LabeledLatents, rows: Tensor) -> Tensor:
    """For each of the rows the next one of them with another reference, [n]."""
    flat = data.references[rows].flatten(1)
    # Not by products, which give equal rows a distance.
    different = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") > 1e-3
    if not different.any(1).all():
        raise ValueError("all kept videos have one and the same reference: there is none to compare it with")
    places = torch.arange(len(rows))
    ahead = (places[None] - places[:, None]) % len(rows)
    return rows[torch.where(different, ahead, len(rows)).argmin(1)]


def _in_parts(
    network: IdentityNetwork,
    space: LatentSpace,
    data: LabeledLatents,
    rows: Tensor,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    return torch.cat(
        [
            _asked(network, space, data, rows[at], sigma[at], noise[at]).cpu()
            for at in torch.split(torch.arange(len(rows)), 100)
        ]
    )


def _asked(
    network: IdentityNetwork,
    space: LatentSpace,
    data: LabeledLatents,
    rows: Tensor,
    sigma: Tensor,
    noise: Tensor,
    silent: Tensor | None = None,
) -> Tensor:
    """Logits for rows of the set, noised; silent: which have no text."""
    device = next(network.parameters()).device
    level = sigma.reshape(-1, 1, 1, 1, 1)
    z, text = (1 - level) * data.latents[rows] + level * noise, data.text[rows]
    if silent is not None:
        text = torch.where(silent.reshape(-1, 1, 1), data.nothing, text)
    time = space.time(sigma)
    inputs = (tensor.to(device) for tensor in (z, time, text, data.references[rows]))
    logits: Tensor = network(*inputs)
    return logits
