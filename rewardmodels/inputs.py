"""What rewards of pictures may take for granted; all else is refused here, in the name of the reward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmalign.records import Masks, Outcome

OUTSIDE = 1e-3  # how far a pixel may lie outside of [0, 1]: rounding, not another scale


def pictures(
    name: str, outcome: Outcome, device: str | torch.device | None = None, graph: bool = False
) -> Tensor:
    """The pictures of an outcome, float32 [B * views, 3, H, W], on `device` (None: where they are).

    graph: keep the graph that they come with, for rewards that are differentiated.
    """
    found = _checked(name, outcome, device, ndim=4, shape="[samples, 3, height, width]")
    return found if graph else found.detach()


def frames(name: str, outcome: Outcome, device: str | torch.device | None = None) -> Tensor:
    """Videos [B * views, F, 3, H, W], and pictures as videos of one frame; otherwise as `pictures`."""
    if isinstance(outcome.media, Tensor) and outcome.media.ndim == 4:
        return pictures(name, outcome, device)[:, None]
    shape = "[samples, 3, height, width] or [samples, frames, 3, height, width]"
    return _checked(name, outcome, device, ndim=5, shape=shape).detach()


def of_frames(videos: Tensor) -> Masks:
    """Units that speak of one frame each, for videos [N, F, 3, H, W]."""
    count, length = videos.shape[:2]
    return Masks(torch.eye(length).reshape(1, length, length, 1, 1).expand(count, -1, -1, -1, -1))


def texts(outcome: Outcome) -> list[str]:
    """The prompt of every row of the media."""
    return [text for text in outcome.prompts.text for _ in range(outcome.views)]


def extras(outcome: Outcome) -> list[Mapping[str, object]]:
    """What the prompt of every row of the media brings along."""
    return [extra for extra in outcome.prompts.extra for _ in range(outcome.views)]


def _checked(name: str, outcome: Outcome, device: str | torch.device | None, ndim: int, shape: str) -> Tensor:
    media, rows = outcome.media, len(outcome.prompts) * outcome.views
    if not isinstance(media, Tensor):
        raise TypeError(
            f"{name} judges pictures, and was given {type(media).__name__} instead of a tensor; "
            "use it with a policy that draws"
        )
    if media.ndim != ndim or media.shape[-3] != 3 or not media.numel():
        raise ValueError(f"{name}: media must be {shape}, got {tuple(media.shape)}")
    if len(media) != rows:
        raise ValueError(f"{name}: the prompts ask for {rows} pictures (samples x views), got {len(media)}")
    if not media.is_floating_point():
        raise ValueError(f"{name}: pixels must be floats in [0, 1], got {media.dtype}; divide by 255")
    media = media.to(device=device, dtype=torch.float32)
    flat = media.detach().flatten(1)
    low, high = torch.stack([flat.amin(1), flat.amax(1)]).cpu()
    if broken := int((~torch.isfinite(low + high)).sum()):
        raise ValueError(
            f"{name}: {broken} of {len(media)} pictures have NaN or infinite pixels; decode them in fp32, "
            "and if that does not help lower the learning rate"
        )
    if low.min() < -OUTSIDE or high.max() > 1 + OUTSIDE:
        raise ValueError(
            f"{name}: pixels must lie in [0, 1], got [{low.min():.3g}, {high.max():.3g}]; "
            "map and clamp them after decoding"
        )
    return media.clamp(0, 1)
