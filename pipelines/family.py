"""What families of flow transformers have in common; a family says only in what it differs.

Whatever scheduler a model comes with, it is sampled by Euler steps on that scheduler's sigmas, which
`policy.shift` may move.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import PolicySettings
from mmalign.pipelines.flow import DTYPES, Condition, guided

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


class Family:
    """Adapter of pictures; an empty pipeline is read from `settings.model`.

    kind: name of the diffusers pipeline. autoencoder: what it calls its own. patch: places of the latent
    along a side of one token. default_side: places along a side of a picture, where the network's
    configuration has no `sample_size`. rescales: it takes a `guidance_rescale`.
    """

    kind: str
    component = "transformer"
    autoencoder = "vae"
    lora_targets: tuple[str, ...] = ATTENTION
    patch = 2
    default_side = 128
    rescales = False

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        if pipeline is None:
            pipeline = read(self.kind, settings, (self.component,), self.autoencoder)
        self.pipeline: Any = pipeline
        self.settings, self.max_sequence_length = settings, settings.max_sequence_length
        self.network: nn.Module = getattr(self.pipeline, self.component)
        self.read_schedule()
        if settings.shift is not None:
            self.pipeline.scheduler = shifted(self.pipeline.scheduler, settings.shift)
        if settings.guidance_rescale and not self.rescales:
            raise ValueError(f"policy.guidance_rescale must be 0: a {self.kind} has none")

    def read_schedule(self) -> None:
        """ValueError where the model's scheduler has no schedule that fits."""
        check_schedule(self.pipeline.scheduler)

    @property
    def idle(self) -> tuple[str, ...]:
        """How names of layers begin that no prediction depends on; none of them gets an adapter.

        Ranks that exchange gradients would wait for its.
        """
        return ()

    # ---- sizes

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return getattr(self.pipeline, self.component).config

    @property
    def vae(self) -> Any:
        return getattr(self.pipeline, self.autoencoder)

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    @property
    def channels(self) -> int:
        return int(self.config.in_channels)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        return (self.channels, *self.sides(height, width))

    def default_pixels(self) -> tuple[int, int]:
        """Height and width where the settings give none."""
        side = int(self.config.get("sample_size") or self.default_side) * self.scale
        return side, side

    def sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Places of the latent along height and width; ValueError if the size does not fit."""
        cell, (high, wide) = self.scale * self.patch, self.default_pixels()
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < cell or pixels % cell):
                raise ValueError(f"policy.{name} must be a multiple of {cell} for this model, got {pixels}")
        return (height or high) // self.scale, (width or wide) // self.scale

    # ---- texts

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def encode(self, text: str) -> Condition:
        """What the network is told of a text, without a batch; here embeddings of one encoder alone."""
        embeds, *_ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"embeds": embeds[0]}

    # ---- time

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The scheduler's own schedule, from even steps where the pipeline begins with those."""
        even = np.linspace(1.0, 1 / steps, steps).tolist()
        return schedule(self.pipeline.scheduler, steps, even, self.shift(steps, shape))

    def tokens(self, shape: Sequence[int]) -> int:
        """How many the network sees of a latent of this shape."""
        *frames, high, wide = shape[1:]
        return int(np.prod(frames, dtype=int)) * (high // self.patch) * (wide // self.patch)

    def shift(self, steps: int, shape: Sequence[int]) -> float:
        """mu of a dynamic shift, a line through two lengths; schedulers without one do not look at it."""
        config = self.pipeline.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (most - base) / (high - low)
        return float(self.tokens(shape) * slope + base - slope * low)

    # ---- the network

    def rows(self, guidance: float) -> int:
        return 2 if guidance > 1 else 1

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        if negative is None:
            return self.predict(network, x, sigma, condition).float()
        x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        both = {name: torch.cat([negative[name], condition[name]]) for name in condition}
        return self.combine(self.predict(network, x, sigma, both).float(), guidance)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The velocity of x at sigma without guidance."""
        raise NotImplementedError

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        """Guidance; both: velocities of the negative half, then of the positive half, in fp32."""
        return guided(both, guidance)

    def told(self, x: Tensor) -> Tensor:
        """The guidance that a guidance-distilled network is told, [n]."""
        given = self.settings.embedded_guidance
        return x.new_full((len(x),), self.default("guidance_scale") if given is None else given)

    def default(self, name: str) -> Any:
        """What a call of the pipeline has by default."""
        return inspect.signature(type(self.pipeline).__call__).parameters[name].default

    # ---- media

    def from_vae(self, raw: Tensor) -> Tensor:
        """Latents as the network sees them, from those of the encoder."""
        config = self.vae.config
        return (raw - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def to_vae(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        media: Tensor = self.vae.decode(self.to_vae(latents), return_dict=False)[0]
        return (media / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        return self.from_vae(self.vae.encode(media * 2 - 1).latent_dist.mode())


class VideoFamily(Family):
    """Adapter of videos: latents [n, C, F, h, w], media [n, F, 3, H, W].

    temporal: frames of a video for each frame of its latent but the first, which holds one.
    """

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_scale_factor_temporal)

    def default_pixels(self) -> tuple[int, int]:
        return self.default("height"), self.default("width")

    @property
    def frames(self) -> int:
        """Of a video; ValueError where its latent cannot hold so many."""
        frames = self.settings.frames or self.default("num_frames")
        if frames < 1 or (frames - 1) % self.temporal:
            raise ValueError(
                f"policy.frames must be 1 more than a multiple of {self.temporal} for this model, got "
                f"{frames}"
            )
        return int(frames)

    @property
    def drawn(self) -> int:
        """Frames of the latent that are the video's."""
        return (self.frames - 1) // self.temporal + 1

    @property
    def extra(self) -> int:
        """Frames of the latent before those of the video."""
        return 0

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        return (self.channels, self.extra + self.drawn, *self.sides(height, width))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).transpose(1, 2)

    def latents(self, media: Tensor) -> Tensor:
        return super().latents(media.transpose(1, 2))


class Standardized:
    """Latents in units of their channels' means and standard deviations, as the Wan autoencoder has them."""

    pipeline: Any

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        shape = (1, -1, *[1] * (like.ndim - 2))
        mean, std = (like.new_tensor(m).reshape(shape) for m in (config.latents_mean, config.latents_std))
        return mean, std

    def from_vae(self, raw: Tensor) -> Tensor:
        mean, std = self._moments(raw)
        return (raw - mean) / std

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return latents * std + mean


class FoldedStatistics:
    """Latents of FLUX.2's autoencoder, two by two places in one, in units of the statistics of those."""

    pipeline: Any

    def _moments(self) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)

    def from_vae(self, raw: Tensor) -> Tensor:
        mean, std = self._moments()
        return (F.pixel_unshuffle(raw, 2) - mean) / std

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._moments()
        return F.pixel_shuffle(latents * std + mean, 2)


def read(
    kind: str,
    settings: PolicySettings,
    components: Sequence[str] = ("transformer",),
    autoencoder: str = "vae",
) -> Any:
    """The diffusers pipeline `kind` of a model, without the parts that it does not have or that are left out.

    components: its denoisers, which are in fp32 where all of their weights are trained. autoencoder: what it
    calls its own.
    """
    import diffusers

    pipeline, frozen = getattr(diffusers, kind), DTYPES[settings.precision]
    dtypes = {name: frozen if settings.lora.rank else torch.float32 for name in components}
    # The half-precision errors of a decoder are visible, and it is a small part of the cost.
    dtypes |= {autoencoder: torch.float32, "default": frozen}
    index = pipeline.load_config(settings.model)
    absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
    for name in settings.leave_out:
        if name not in index:
            raise ValueError(f"policy.leave_out: {name} is no component of {settings.model}")
        absent.append(name)
    absent += [
        tokenizer
        for name in absent
        if (tokenizer := name.replace("text_encoder", "tokenizer")) in index and tokenizer not in absent
    ]
    parts = dict.fromkeys(absent) | other_vae(settings, index, autoencoder)
    return pipeline.from_pretrained(settings.model, dtype=dtypes, **parts)


def other_vae(settings: PolicySettings, index: Mapping[str, Any], name: str = "vae") -> dict[str, Any]:
    """The autoencoder that the settings name in place of the pipeline's own, in fp32, if they name one.

    index: what the pipeline says of its parts. name: what it calls this one.
    """
    import diffusers

    if settings.vae is None:
        return {}
    if name not in index:
        raise ValueError(f"policy.vae must be null: a {index['_class_name']} has no autoencoder")
    kind = getattr(diffusers, index[name][1])
    try:
        vae = kind.from_pretrained(settings.vae, torch_dtype=torch.float32)
    except Exception as error:  # as of `load`
        raise ValueError(f"policy.vae: {settings.vae} does not load as {kind.__name__}: {error}") from error
    own = kind.load_config(settings.model, subfolder=name)
    for size in ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor"):
        given, known = vae.config.get(size), own.get(size)
        if size == "block_out_channels":  # as many levels, or latents are of another size
            given, known = (len(widths) if widths else None for widths in (given, known))
        if given != known:
            raise ValueError(
                f"policy.vae: {settings.vae} has {size} {given}, and the model's own {known}; it must have "
                "the same latents"
            )
    return {name: vae}


def check_schedule(scheduler: Any) -> None:
    """ValueError where a scheduler has no schedule of a flow."""
    if not isinstance(scheduler, flow_schedulers()) and not scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"its scheduler is {type(scheduler).__name__}, but stochastic steps are defined on the schedule "
            "of FlowMatchEulerDiscreteScheduler, or of another with use_flow_sigmas"
        )


def flow_schedulers() -> tuple[Any, ...]:
    """Schedulers that are told the shift.

    The steps of LCM, for models that were distilled to few of them, are those of `Noise("cps", 1.0)`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    return FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler


def shifted(scheduler: Any, shift: float) -> Any:
    """A scheduler like the given one with a fixed shift; ValueError where it has none."""
    if not shift > 0:
        raise ValueError(f"policy.shift must be positive, got {shift}")
    config = scheduler.config
    if isinstance(scheduler, flow_schedulers()):
        name = "shift"
    elif config.get("use_flow_sigmas") and "flow_shift" in config:
        name = "flow_shift"
    else:
        kind = type(scheduler).__name__
        raise ValueError(f"policy.shift must be null: {kind}, the scheduler of this model, has no shift")
    # What would move the schedule once more.
    others = {"use_dynamic_shifting": False, "shift_terminal": None}
    fixed = {key: value for key, value in others.items() if key in config}
    return type(scheduler).from_config(config, **{name: shift}, **fixed)


def schedule(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Tensor:
    """The sigmas [steps + 1] of a scheduler; sigmas: what it begins with, None leaves that to it."""
    scheduler = copy.deepcopy(scheduler)
    if not isinstance(scheduler, flow_schedulers()):
        scheduler.set_timesteps(steps)
    elif sigmas is None:
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return torch.as_tensor(scheduler.sigmas).float()


def rescaled(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """A guided prediction brought back to the standard deviation of the positive one, by a share of 0 to 1.

    Arxiv 2305.08891, equations 15 and 16.
    """
    if not share:
        return guided
    dims = tuple(range(1, guided.ndim))
    even = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return share * even + (1 - share) * guided


def renormalized(guided: Tensor, positive: Tensor, dim: int) -> Tensor:
    """A guided prediction with the norm that the positive one has along `dim`."""
    return guided * (positive.norm(dim=dim, keepdim=True) / guided.norm(dim=dim, keepdim=True))


def toward(picture: Tensor, x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """Velocities of videos x [n, C, F, h, w] whose first frame points straight at the latent of a picture.

    picture: [n, C, 1, h, w]. Every step of the ODE and its end are right there, whatever noise is drawn.
    """
    ahead = (x[:, :, :1] - picture) / sigma.reshape(-1, 1, 1, 1, 1)
    return torch.cat([ahead.to(velocity.dtype), velocity[:, :, 1:]], 2)


def pack(x: Tensor) -> Tensor:
    """[n, C, h, w] as tokens of two by two places, [n, h/2 w/2, 4 C]."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, high: int, wide: int) -> Tensor:
    """The inverse of `pack`; high, wide: places of the latent."""
    folded = torch.unflatten(tokens.transpose(1, 2), 2, (high // 2, wide // 2))
    return F.pixel_shuffle(folded, 2)


def padded(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [L, D] cut or filled with zeros to [length, D], and where they speak, [length] bool."""
    kept = tokens[:length]
    mask = torch.arange(length, device=tokens.device) < len(kept)
    return F.pad(kept, (0, 0, 0, length - len(kept))), mask


def filled(tokens: Tensor, length: int, text: str) -> tuple[Tensor, Tensor]:
    """As `padded`, of a text that a model takes whole; ValueError where it is longer."""
    if len(tokens) > length:
        raise ValueError(
            f"policy.max_sequence_length is {length}, and this model takes texts whole; of {text!r} it sees "
            f"{len(tokens)} tokens"
        )
    return padded(tokens, length)
