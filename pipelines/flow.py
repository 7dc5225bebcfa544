"""A policy over any flow model: one network, one replay, one way to place credit.

What a model family needs of its own is a `FlowAdapter`; the denoising loop is `mmalign.rollout`; everything
else is written here once. A group is one prompt sampled several times, and its members share work wherever
the plan lets them: texts are encoded once, members that have drawn the same noise so far are one state, and
actions taken in one state share one forward, in sampling and in the update. The gradient is the same, because
every member's loss sees the weights through that one velocity.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmalign.contracts import Forwards, Key, LoraSettings, PolicySettings
from mmalign.copies import Copies
from mmalign.pictures import frames_of, open_picture
from mmalign.randomness import generator, normals
from mmalign.records import (
    Evaluation,
    Halted,
    Masks,
    Noised,
    Outcome,
    Pick,
    Plan,
    Prompts,
    Split,
    State,
    Steps,
    Trajectory,
    Where,
    Whole,
)
from mmalign.rollout import Rollout, distinct, halt, noise_again, retake, roll_out
from mmalign.sde import Noise

Condition = Mapping[str, Tensor]  # what the network sees of a text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"  # of peft
PEFT_PREFIX = "base_model.model."  # of the names in it
DECODED_PLACES = 2**14  # of latents decoded at once: four images of 512x512 keep a device busy and fit
CLEAN = 0.05  # the most sigma at which a schedule may end; diffusion models were never shown less than 0.03


class FlowAdapter(Protocol):
    """All that is particular to a family of flow models.

    Latents are [n, C, *place] in fp32, whatever the network makes of them (packing them into tokens is the
    adapter's own affair). pipeline: the diffusers pipeline, whose class writes LoRA files. network: its
    denoiser, which the pipeline calls `component`, or its `Experts`. lora_targets: endings of the names of
    the layers that get adapters. scale: pixels along a side of a place of the latent.
    """

    pipeline: Any
    network: nn.Module
    component: str
    lora_targets: tuple[str, ...]
    scale: int

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """[C, *place] of one sample; None is the model's own size; ValueError if the size does not fit."""
        ...

    def encode(self, text: str) -> Condition:
        """What the network sees of one text, without a batch dimension; all texts give equal shapes."""
        ...

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The schedule [steps + 1] for latents of this shape, falling to 0 or what counts as it."""
        ...

    def rows(self, guidance: float) -> int:
        """Network rows for one sample: 2 where guidance needs a second, negative one."""
        ...

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        """The velocity of x [n, C, *place] at sigma [n] in fp32, by one call of `network`.

        network: `self.network` or what the trainer wrapped around it. negative: given where rows(guidance) is
        2.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Media of clean latents, [n, 3, H, W] or [n, F, 3, H, W] with values in [0, 1]; gradients flow."""
        ...

    def latents(self, media: Tensor) -> Tensor:
        """Clean latents in fp32 of media as `decode` gives them: the mean of the encoder, without noise."""
        ...


@runtime_checkable
class SeesPictures(Protocol):
    """An adapter whose network also sees pictures: to edit them, to begin a video with them, as references.

    They are the files that a prompt names as its `source`, one or a list, each fitted to the policy's size.
    needs_pictures: whether it refuses prompts without one.
    """

    needs_pictures: bool

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        """What the network sees of one text and its pictures [k, 3, H, W] in [0, 1]; else as `encode`."""
        ...


@runtime_checkable
class EncodesNegatives(Protocol):
    """An adapter that encodes what guidance leads away from otherwise than a prompt of the same words."""

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        """As `SeesPictures.encode_with`; pictures: those of the prompt, [0, 3, H, W] where it has none."""
        ...


class Experts(nn.Module):
    """Networks that divide the times among them, by the names that the pipeline calls them.

    The first takes the times from `boundary` on, in the network's own unit, the second those below. Rows of
    both go to each in turn; a batch at one time takes one forward. Times without content, on the meta device,
    are taken for early and late by turns. anyone: as of `KeepsStep`; a network that another process asks is
    shown a row that nobody reads.
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.boundary = boundary
        self.anyone: Callable[[bool], bool] = bool

    def early(self, timestep: Tensor) -> Tensor:
        """Which times are those of the first network, [n] bool."""
        return timestep >= self.boundary

    def forward(self, timestep: Tensor, **inputs: Tensor) -> tuple[Tensor]:
        """As the networks' own, with one timestep [n] a row; inputs: tensors [n, ...]."""
        by_turns = torch.arange(len(timestep)) % 2 == 0
        early = by_turns if timestep.is_meta else self.early(timestep).cpu()
        parts, places, unread = [], [], torch.zeros((), device=timestep.device)
        for network, rows in zip(self.children(), (early, ~early), strict=True):
            asked = bool(rows.any())
            if not self.anyone(asked):
                continue
            place = rows.nonzero()[:, 0] if asked else torch.zeros(1, dtype=torch.int64)
            at = place.to(timestep.device)
            own = {name: tensor[at] for name, tensor in inputs.items()}
            found = network(timestep=timestep[at], return_dict=False, **own)[0]
            if asked:
                parts.append(found)
                places.append(place)
            else:
                unread = 0 * found.sum()  # its backward takes all processes too
        back = torch.cat(places).argsort().to(timestep.device)
        velocity = torch.cat(parts)[back]
        return (velocity + unread.to(velocity.dtype),)


def guided(both: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance in fp32; both: velocities of the negative half, then of the positive half.

    guidance: of all rows, or what broadcasts against one half.
    """
    negative, positive = both.float().chunk(2)
    return negative + guidance * (positive - negative)


def pooled(condition: Condition) -> Tensor:
    """One vector [D] in fp32 of what the network sees of a prompt.

    Embeddings of tokens count by the mean of those that a mask, where there is one, lets speak, pictures by
    that of their rows. Each part has mean 0 and deviation 1, so that none drowns another. Whole numbers
    (places, masks) are no part.
    """
    parts = []
    for name in sorted(condition):
        part, mask = condition[name], condition.get("mask")
        if name == "mask" or not part.is_floating_point():
            continue
        part = part.float()
        if mask is not None and name == "embeds" and mask.shape == part.shape[:1]:
            part = part[mask.bool()]
        mean = part if part.ndim == 1 else part.flatten(0, -2).mean(0)
        parts.append(F.layer_norm(mean, mean.shape))
    return torch.cat(parts)


@dataclass(frozen=True)
class _Texts:
    """Encoded texts of n rows: tensors [distinct, ...], and every row's place there [n].

    negative: the place of what guidance leads away from, [n], where guidance asks for it.
    """

    tensors: Condition
    place: Tensor
    negative: Tensor | None = None

    def positives(self) -> Condition:
        return {name: tensor[self.place] for name, tensor in self.tensors.items()}

    def negatives(self) -> Condition | None:
        if self.negative is None:
            return None
        return {name: tensor[self.negative] for name, tensor in self.tensors.items()}

    def of(self, rows: Tensor | slice) -> _Texts:
        negative = None if self.negative is None else self.negative[rows]
        return _Texts(self.tensors, self.place[rows], negative)


def computing(
    settings: PolicySettings, device: torch.device, again: bool = True
) -> AbstractContextManager[object]:
    """Around forwards of the network: their matrix products are at the precision of the settings.

    again: whether weights are used more than once, as in writing token by token. Then the casts of trained
    ones are kept until the end, 2 bytes a parameter.
    """
    if settings.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[settings.precision], cache_enabled=again)


class FlowPolicy:
    """A flow model as a policy: its actions are the stochastic denoising steps.

    split: keep one log-probability for each frame of the latent of a video, or for each place of a latent, so
    that `locate` can place Masks; a policy with ratios per place has another objective, with its own clip
    range. chunk: network rows of one forward in sampling; raise it until the device is busy, lower it if
    memory runs out. seed: of the first LoRA weights.

    `replay` holds per action x, x_next and its mean [B, S, *latent], sigma and sigma_next [B, S] and, on the
    CPU, state [B, S] (see `state_ids`); per sample the schedule's guard [B]. Floats are fp32 at every
    precision.
    """

    def __init__(
        self,
        adapter: FlowAdapter,
        settings: PolicySettings,
        noise: Noise,
        device: torch.device | str = "cpu",
        *,
        split: Split = "whole",
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        if settings.guidance < 1:
            raise ValueError(f"policy.guidance must be 1 (off) or more, got {settings.guidance}")
        if settings.lora.rank < 0:
            raise ValueError(f"policy.lora.rank must be 0 (all weights) or more, got {settings.lora.rank}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least one network row, got {chunk}")
        low = settings.low_noise_guidance
        if low is not None and not isinstance(adapter.network, Experts):
            raise ValueError(f"policy.low_noise_guidance must be null: this model has one network; got {low}")
        if low is not None and low < 1:
            raise ValueError(f"policy.low_noise_guidance must be 1 (off) or more, got {low}")
        self.adapter, self.settings, self.noise = adapter, settings, noise
        self.device, self.split, self.chunk = torch.device(device), split, chunk
        self.shape = adapter.latent_shape(settings.height, settings.width)
        if split == "frames" and len(self.shape) == 3:
            raise ValueError("credit by frames needs a model of videos; this one makes pictures")
        if settings.frames is not None and len(self.shape) == 3:
            raise ValueError(f"policy.frames: this model makes pictures, not videos; got {settings.frames}")
        self.forwards = Forwards()
        self.cached_texts = 256  # raise it to hold all prompts of a run; an SD3.5 text is 3 MB in bf16
        self._cache: OrderedDict[tuple[str, tuple[str, ...], bool], Condition] = OrderedDict()
        self._schedules: dict[int, Tensor] = {}
        self._network = cast(Any, adapter.network)
        for frozen in adapter.pipeline.components.values():
            if isinstance(frozen, nn.Module):
                frozen.requires_grad_(False)
                frozen.eval()
                frozen.to(self.device)
        self._parts: dict[str, Any] = (
            dict(adapter.network.named_children())
            if isinstance(adapter.network, Experts)
            else {adapter.component: adapter.network}
        )
        self._classes = {name: type(part).__name__ for name, part in self._parts.items()}
        for name, part in self._parts.items():
            if settings.lora.rank:
                own = "" if name == adapter.component else f"{name}."
                targets = settings.lora.targets or adapter.lora_targets
                add_lora(part, settings.lora, targets, seed, own, getattr(adapter, "idle", ()))
            else:
                part.float().requires_grad_(True)
            if settings.gradient_checkpointing:
                if not part._supports_gradient_checkpointing:
                    raise ValueError(
                        f"policy.gradient_checkpointing must be false: a {self._classes[name]} has none"
                    )
                part.enable_gradient_checkpointing()
        self.module: nn.Module = self._network
        self.copies = Copies(self._network)

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def in_part(self) -> bool:
        """Of experts a forward may ask one alone; a network has layers that no prediction depends on."""
        return isinstance(self.adapter.network, Experts) or not self.settings.lora.rank

    @property
    def anyone(self) -> Callable[[bool], bool]:
        """As of `KeepsStep`, which a policy of experts is; a single network is in every forward."""
        return cast(Experts, self.adapter.network).anyone

    @anyone.setter
    def anyone(self, ask: Callable[[bool], bool]) -> None:
        cast(Experts, self.adapter.network).anyone = ask

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        """Sample by the plan: the ODE, noise drawn at `plan.stochastic` and recorded at `plan.sde_steps`."""
        sigmas, samples = self._schedule(plan.steps), len(prompts)
        if plan.given:
            media, clean = self._given(prompts)
            replay: dict[str, Tensor] = {}
            if plan.halt:
                rolled = self._roll_out(prompts, plan, key, self.settings.guidance)
                replay = halt(prompts, rolled.halted, clean, plan, sigmas, key)
        else:
            rolled = self._roll_out(prompts, plan, key, self.settings.guidance)
            # A state that several samples are in is decoded once.
            media = torch.stack([self._decode(view.x)[view.row] for view in rolled.views], 1).flatten(0, 1)
            clean, replay = rolled.views[0].x[rolled.views[0].row], dict(rolled.actions)
            replay["guard"] = sigmas[1].expand(samples)
            if plan.halt:
                replay = halt(prompts, rolled.halted, clean, plan, sigmas, key)
        if plan.renoise:
            kept = replay if plan.halt else {}
            replay = kept | noise_again(prompts, clean, plan.renoise, sigmas, key)
        site, actions = self.site, plan.actions
        recorded = replay.pop("log_prob", torch.zeros(samples, actions, *site, device=self.device))
        mask = torch.ones(samples, actions, dtype=torch.bool, device=self.device)
        if plan.learned is not None:
            mask &= torch.tensor([step in plan.learned for step in plan.sde_steps], device=self.device)
        return Trajectory(Outcome(prompts, media, plan.views), recorded, mask, replay, plan, sigmas)

    def _roll_out(
        self, prompts: Prompts, plan: Plan, key: Key, guidance: float, tuned: int | None = None
    ) -> Rollout:
        """Sample by the plan; tuned: how many steps, from the noise on, are not left to the base model."""
        texts, sigmas = self._seen(prompts, guidance), self._schedule(plan.steps)
        turn = sigmas[-1] if tuned is None else sigmas[tuned]

        def velocity(x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
            with self._base() if sigma[0] <= turn else nullcontext():
                return self._velocity(x, sigma, texts.of(sample), guidance)

        return roll_out(prompts, plan, key, sigmas, self.shape, self.noise, self._dims, velocity)

    def _given(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The `image` or `video` of each prompt, at the policy's size, and their latents."""
        named = zip(prompts.text, prompts.extra, strict=True)
        media = torch.stack([self._media(*given) for given in named]).to(self.device)
        rows = max(1, DECODED_PLACES // prod(self.shape[1:]))
        return media, torch.cat([self.adapter.latents(part) for part in torch.split(media, rows)])

    def _media(self, text: str, extra: Mapping[str, object]) -> Tensor:
        """The picture [3, H, W] or video [F, 3, H, W] that a prompt gives as its sample."""
        key = "image" if len(self.shape) == 3 else "video"
        named = extra.get(key)
        if key == "image":
            if not isinstance(named, str):
                raise ValueError(f'prompt {text!r} names no picture: it needs a path under "image"')
            return self._picture(named)
        found = frames_of(named) if isinstance(named, str | list) and named else None
        if found is None:
            raise ValueError(
                f'prompt {text!r} gives no video: it needs a folder of frames, or a list, under "video"'
            )
        drawn, temporal = self._drawn
        frames = (drawn - 1) * temporal + 1
        if len(found) < frames:
            raise ValueError(
                f"prompt {text!r}: its video has {len(found)} frames, and the model makes {frames}"
            )
        return torch.stack([self._picture(file) for file in found[:frames]])

    def _picture(self, file: str) -> Tensor:
        height, width = (places * self.adapter.scale for places in self.shape[-2:])
        return read_picture(file, height, width)

    @torch.no_grad()
    def images(
        self,
        prompts: Prompts,
        steps: int,
        key: Key,
        guidance: float | None = None,
        tuned: float = 1.0,
    ) -> Tensor:
        """Media sampled by the ODE alone, [B, 3, H, W] or [B, F, 3, H, W]; guidance: None is its own.

        tuned: the share of the steps, from the noise on, that is not left to the base model.
        """
        guidance = self.settings.guidance if guidance is None else guidance
        (view,) = self._roll_out(prompts, Plan(steps), key, guidance, round(tuned * steps)).views
        return self._decode(view.x)[view.row]

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Run without the adapters, as the model was before training."""
        if not self.settings.lora.rank:
            raise ValueError(
                "evaluation.tuned below 1 needs the base model, which policy.lora.rank=0 (all weights are "
                "trained) does not keep"
            )
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [part for part in self._network.modules() if isinstance(part, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def _schedule(self, steps: int) -> Tensor:
        if steps not in self._schedules:
            sigmas = self.adapter.sigmas(steps, self.shape).float()
            falls = bool((sigmas.diff() < 0).all())  # nor is one with NaN a schedule
            if not (len(sigmas) == steps + 1 and sigmas[0] <= 1 and 0 <= sigmas[-1] <= CLEAN and falls):
                raise ValueError(
                    f"a schedule of {steps} steps must fall from at most 1 to 0 (at most {CLEAN}), got "
                    f"{sigmas.tolist()}"
                )
            self._schedules[steps] = sigmas.to(self.device)
        return self._schedules[steps]

    def _decode(self, latents: Tensor) -> Tensor:
        rows = max(1, DECODED_PLACES // prod(self.shape[1:]))
        return torch.cat([self.adapter.decode(part) for part in torch.split(latents, rows)])

    # ---- the network

    def _velocity(self, x: Tensor, sigma: Tensor, texts: _Texts, guidance: float) -> Tensor:
        """Velocities [n, C, *place] in forwards of at most `chunk` network rows, counted as sampling."""
        self.forwards.sample += len(x) * self.adapter.rows(guidance)
        size = max(1, self.chunk // self.adapter.rows(guidance))
        cuts = [slice(first, first + size) for first in range(0, len(x), size)]
        return torch.cat([self._forward(x[cut], sigma[cut], texts.of(cut), guidance) for cut in cuts])

    def _forward(self, x: Tensor, sigma: Tensor, texts: _Texts, guidance: float) -> Tensor:
        seen, unwanted = texts.positives(), texts.negatives()
        with computing(self.settings, self.device, again=False):
            velocity = self.adapter.velocity(self.module, x, sigma, seen, unwanted, guidance)
        return velocity.float()

    def _seen(self, prompts: Prompts, guidance: float) -> _Texts:
        """What the network sees of the prompts: their texts, and the pictures that they name as `source`."""
        if not isinstance(self.adapter, SeesPictures):
            return self._texts(prompts.text, guidance)
        rows = zip(prompts.text, prompts.extra, strict=True)
        sources = [sources_of(text, extra, self.adapter.needs_pictures) for text, extra in rows]
        if len(counts := {len(files) for files in sources}) > 1:
            raise ValueError(f"all prompts need equally many pictures as source, got {sorted(counts)}")
        return self._texts(prompts.text, guidance, sources)

    def _texts(
        self, texts: Sequence[str], guidance: float, sources: Sequence[tuple[str, ...]] | None = None
    ) -> _Texts:
        """The encoded texts of some rows, with the negative one where guidance asks for it."""
        files = [()] * len(texts) if sources is None else sources
        apart = isinstance(self.adapter, EncodesNegatives)
        wanted = [(text, own, False) for text, own in zip(texts, files, strict=True)]
        unwanted = [(self.settings.negative_prompt, own, apart) for own in files]
        guides = self.adapter.rows(guidance) == 2
        place = {key: i for i, key in enumerate(dict.fromkeys([*wanted, *(unwanted if guides else [])]))}
        encoded = [self._encode(*key) for key in place]
        return _Texts(
            {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]},
            torch.tensor([place[key] for key in wanted]).to(self.device),
            torch.tensor([place[key] for key in unwanted]).to(self.device) if guides else None,
        )

    def _pictures(self, files: Sequence[str]) -> Tensor:
        """Of files, [n, 3, H, W] in the size that is made."""
        high, wide = (places * self.adapter.scale for places in self.shape[-2:])
        empty = torch.zeros(0, 3, high, wide)
        return torch.cat([empty, *(self._picture(file)[None] for file in files)]).to(self.device)

    @torch.no_grad()
    def _encode(self, text: str, files: tuple[str, ...] = (), negative: bool = False) -> Condition:
        """One text at a time: its numbers must not depend on neighbors, which differ in a resumed run.

        negative: whether it is encoded as what guidance leads away from (`EncodesNegatives`).
        """
        key = (text, files, negative)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if negative and isinstance(self.adapter, EncodesNegatives):
            seen = self.adapter.encode_negative(text, self._pictures(files))
        elif isinstance(self.adapter, SeesPictures):
            seen = self.adapter.encode_with(text, self._pictures(files))
        else:
            seen = self.adapter.encode(text)
        condition = {name: tensor.to(self.device) for name, tensor in seen.items()}
        self._cache[key] = condition
        if len(self._cache) > self.cached_texts:
            self._cache.popitem(last=False)
        return condition

    # ---- the rest of the way, with gradients

    def halted(self, trajectory: Trajectory, pick: Pick) -> Halted:
        """Where the picked samples were halted (`Plan.halt`), and where they ended."""
        replay, rows, columns = trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
        if "path" not in replay:
            raise ValueError("these samples were not halted on their way: the plan has no halt")
        return Halted(
            replay["halted"][rows], replay["path"][0], replay["clean"][rows], replay["noise"][rows, columns]
        )

    def velocity(self, trajectory: Trajectory, pick: Pick, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity of states x [n, *latent] at sigma (scalar) for the prompts of the picked samples.

        With gradients it counts as train, and gradient checkpointing keeps nothing of it but x.
        """
        guidance = self.settings.guidance
        texts = self._seen(trajectory.outcome.prompts.take(pick.rows.cpu()), guidance)
        if not torch.is_grad_enabled():
            return self._velocity(x, sigma.expand(len(x)), texts, guidance)
        self.forwards.train += len(x) * self.adapter.rows(guidance)
        if not self.settings.gradient_checkpointing:
            return self._forward(x, sigma.expand(len(x)), texts, guidance)
        velocity: Tensor = checkpoint(
            self._forward, x, sigma.expand(len(x)), texts, guidance, use_reentrant=False
        )
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """Media of clean latents; with gradient checkpointing nothing is kept of it but the latents."""
        if not (self.settings.gradient_checkpointing and latents.requires_grad):
            return self._decode(latents)
        media: Tensor = checkpoint(self._decode, latents, use_reentrant=False)
        return media

    # ---- replay

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        """All unmasked actions of the samples `rows`, in forwards of at most `size` network rows.

        Actions taken in one state are never parted, and states come in one order, whatever the order of
        `rows`.
        """
        rows = rows.cpu()
        place, column = trajectory.mask.cpu()[rows].nonzero(as_tuple=True)
        if not len(place):
            return
        row = rows[place]
        state = distinct(trajectory.replay["state"][row, column])[1]
        states = max(1, size // self.adapter.rows(self.settings.guidance))
        for first in range(0, int(state.max()) + 1, states):
            inside = (state >= first) & (state < first + states)
            yield Pick(row[inside], column[inside])

    def evaluate(self, trajectory: Trajectory, pick: Pick, guidance: float | None = None) -> Evaluation:
        """How likely the picked actions are now, by one forward of their distinct states.

        guidance: of this forward; None is the policy's own. The forward counts as train with gradients
        enabled and as reference otherwise.
        """
        replay, rows, columns = trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
        first, inverse = distinct(replay["state"][rows, columns])
        guidance = self.settings.guidance if guidance is None else guidance
        count = len(first) * self.adapter.rows(guidance)
        if torch.is_grad_enabled():
            self.forwards.train += count
        else:
            self.forwards.reference += count
        x, sigma = replay["x"][rows, columns], replay["sigma"][rows, columns]
        texts = self._seen(trajectory.outcome.prompts.take(rows[first]), guidance)
        velocity = self._forward(x[first], sigma[first], texts, guidance)[inverse]
        if "clean" in replay:
            noised = Noised(x, replay["clean"][rows], sigma.reshape(-1, *[1] * len(self.shape)))
            return Evaluation(trajectory.log_prob[rows, columns], velocity=velocity, noised=noised)
        return retake(trajectory, pick, velocity, self.noise, self._dims)

    def states(self, trajectory: Trajectory, pick: Pick) -> State:
        """Latent, time and pooled text of the picked actions."""
        replay, rows, columns = trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
        texts = self._seen(trajectory.outcome.prompts.take(rows), 1.0)
        encoded = {name: tensor.unbind() for name, tensor in texts.tensors.items()}
        each = zip(*encoded.values(), strict=True)
        text = torch.stack([pooled(dict(zip(encoded, one, strict=True))) for one in each])[texts.place]
        return State(replay["x"][rows, columns], replay["sigma"][rows, columns], text)

    @property
    def site(self) -> tuple[int, ...]:
        """What an action is split into: (), frames (f,), or places ([f,] h, w)."""
        return {"whole": (), "frames": self.shape[1:2], "places": self.shape[1:]}[self.split]

    @property
    def _dims(self) -> tuple[int, ...]:
        """What a log-probability is summed up over, of states [n, C, *place]."""
        return (1, *range(2 + len(self.site), len(self.shape) + 1))

    # ---- places

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        """Footprint of units on the denoising steps, and on the frames or places they are split into.

        No mask lies on frames of a latent that are not of the video.
        """
        actions = trajectory.log_prob
        site = actions.shape[2:]
        if isinstance(where, Whole):
            return torch.ones(1, 1, 1, *[1] * len(site), device=actions.device)
        if isinstance(where, Steps):
            steps = torch.arange(actions.shape[1], device=actions.device)
            hit = (where.index.to(actions.device)[..., None] == steps).float()
            return hit.reshape(*hit.shape, *[1] * len(site))
        if isinstance(where, Masks) and site:
            mask = where.mask.to(actions.device).float()
            if len(self.shape) == 4:
                drawn, temporal = self._drawn
                before = getattr(self.adapter, "extra", 0)
                mask = _on_frames(mask, drawn, temporal)
                mask = F.pad(mask, (0, 0, 0, 0, before, site[0] - before - drawn))
            if self.split == "frames":
                return mask.mean((3, 4))[:, :, None]
            return _on_latent(mask, site)[:, :, None]
        raise TypeError(
            f"a flow policy cannot place {type(where).__name__} on its denoising steps; it can place Whole, "
            "Steps and, where they are split, Masks"
        )

    @property
    def _drawn(self) -> tuple[int, int]:
        """How many frames of the latent are the video's, and of how many of its frames each speaks."""
        return getattr(self.adapter, "drawn", self.shape[1]), getattr(self.adapter, "temporal", 1)

    # ---- files

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the LoRA file that plain diffusers loads, or the network's folder if all of it is trained.

        state: the network's gathered state dict, where its parameters are sharded over processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for component, part in self._parts.items():
            own = state
            if state is not None and len(self._parts) > 1:
                inside = f"{component}."
                own = {k.removeprefix(inside): t for k, t in state.items() if k.startswith(inside)}
            if self.settings.lora.rank:
                self._save_lora(folder, component, part, own)
            else:
                self._save_whole(folder, component, part, own)

    def _save_whole(
        self, folder: Path, component: str, part: Any, state: Mapping[str, Tensor] | None
    ) -> None:
        unfinished = folder / f".{component}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        if state is None:
            part.save_pretrained(unfinished)
        else:
            part.state_dict = lambda: dict(state)  # diffusers asks for no other weights than a model's own
            try:
                part.save_pretrained(unfinished)
            finally:
                del part.state_dict
            config = json.loads((unfinished / "config.json").read_text())
            config["_class_name"] = self._classes[component]  # sharding has put another class in its place
            (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(folder / component, ignore_errors=True)
        unfinished.rename(folder / component)

    def _save_lora(self, folder: Path, component: str, part: Any, state: Mapping[str, Tensor] | None) -> None:
        from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
        from peft import get_peft_model_state_dict

        # Every pipeline writes its denoiser's layers alike; not every one that reads them can write them.
        pipeline = type(self.adapter.pipeline)
        writer: Any = pipeline
        if not hasattr(pipeline, "save_lora_weights"):
            unet = self.adapter.component == "unet"
            writer = StableDiffusionLoraLoaderMixin if unet else SD3LoraLoaderMixin
        layers = get_peft_model_state_dict(part, state_dict=dict(state) if state else None)
        if not takes_adapters(part):
            write_adapter(folder, self.settings, part.peft_config["default"].target_modules, layers)
            return
        file, kind = lora_file(component), self.adapter.component
        named: dict[str, Any] = {
            f"{kind}_lora_layers": {name: t.detach().cpu().contiguous() for name, t in layers.items()},
            f"{kind}_lora_adapter_metadata": part.peft_config["default"].to_dict(),
        }
        writer.save_lora_weights(folder, weight_name=f"part.{file}", **named)
        os.replace(folder / f"part.{file}", folder / file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the trainable parameters from what `save` wrote; they must fit exactly."""
        for component, part in self._parts.items():
            self._load_part(folder, component, part)

    def _load_part(self, folder: Path, component: str, part: nn.Module) -> None:
        from safetensors.torch import load_file

        live = part.state_dict()
        if self.settings.lora.rank:
            lora = {name.replace(".default.", "."): p for name, p in live.items() if ".lora_" in name}
            own = takes_adapters(part)
            prefix = f"{self.adapter.component}." if own else PEFT_PREFIX
            live = {prefix + name: p for name, p in lora.items()}
            files = [folder / (lora_file(component) if own else ADAPTER_FILE)]
        else:
            files = sorted((folder / component).glob("*.safetensors")) or [folder / component]
        if not files[0].is_file():
            raise FileNotFoundError(f"there are no weights of this policy at {files[0]}")
        saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
        take(live, saved, files[0].parent)


@torch.no_grad()
def take(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], place: Path) -> None:
    """Copy what was saved at `place` into the live tensors of equal names; ValueError where they differ."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in state.items()} for state in (saved, live))
    if odd := sorted(set(shapes.items()) ^ set(wanted.items())):
        raise ValueError(
            f"{place} does not fit this policy (policy.lora, policy.model) in {len(odd)} tensors, such as "
            f"{odd[0]}"
        )
    for name, p in live.items():
        p.copy_(saved[name])


def lora_file(component: str) -> str:
    """The file of one denoiser's LoRA; that of a second expert stands beside that of the first."""
    return LORA_FILE.replace(".", f"_{component[-1]}.") if component[-1].isdigit() else LORA_FILE


def sources_of(text: str, extra: Mapping[str, object], needed: bool) -> tuple[str, ...]:
    """The picture files that a prompt names as its `source`."""
    named = extra.get("source")
    if named is None and not needed:
        return ()
    files = [named] if isinstance(named, str) else named
    if not (isinstance(files, list) and files and all(isinstance(file, str) for file in files)):
        raise ValueError(
            f"prompt {text!r} names no picture to start from: this model needs prompts in a .jsonl file with "
            'a path, or a list of paths, under "source"'
        )
    return tuple(files)


def takes_adapters(network: object) -> bool:
    """Whether it is a model of diffusers that loads adapters by itself."""
    from diffusers.loaders.peft import PeftAdapterMixin

    return isinstance(network, PeftAdapterMixin)


def add_lora(
    network: Any,
    settings: LoraSettings,
    targets: Sequence[str],
    seed: int,
    prefix: str = "",
    idle: tuple[str, ...] = (),
) -> None:
    """Put fp32 adapters on the layers whose names end with one of `targets`; at first they change nothing.

    network: a model of diffusers that takes adapters, whose own they become, or any other module. Weights are
    Gaussian as in the literature (A ~ N(0, 1 / rank^2), B = 0), from streams named by the layer, so that they
    are the same on every rank and device and at every precision. prefix: of those names. idle: how names of
    layers begin that get none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = list(targets)
    if idle:
        ends = tuple(f".{target}" for target in targets)
        layers = (name for name, _ in network.named_modules() if f".{name}".endswith(ends))
        names = [name for name in layers if not name.startswith(idle)]
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=names, init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        try:
            if takes_adapters(network):
                network.add_adapter(config)
            else:
                inject_adapter_in_model(config, network)
        except ValueError as error:
            raise ValueError(f"policy.lora.targets: {list(targets)} fit no layer: {error}") from error
    for name, p in network.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            if ".lora_A." in name:
                p.data.copy_(normals([generator(seed, "lora", prefix + name)], p.shape)[0] / settings.rank)


def write_adapter(
    folder: Path, settings: PolicySettings, targets: Sequence[str], layers: Mapping[str, Tensor]
) -> None:
    """Write a LoRA as `peft.PeftModel.from_pretrained(network, folder)` reads it.

    layers: its weights by their names in the network, without that of the adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        target_modules=sorted(targets),
        base_model_name_or_path=settings.model,
        inference_mode=True,
    ).save_pretrained(str(folder))
    named = {PEFT_PREFIX + name: t.detach().cpu().contiguous() for name, t in layers.items()}
    save_file(named, folder / ADAPTER_FILE, {"format": "pt"})


def read_picture(file: str, height: int, width: int) -> Tensor:
    """A picture file as [3, height, width] in [0, 1], its middle scaled to fill that size."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(open_picture(file), (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return pixels.reshape(height, width, 3).permute(2, 0, 1).float() / 255


def _on_frames(mask: Tensor, frames: int, temporal: int) -> Tensor:
    """Masks [B, U, F, H, W] as means over what each frame of the latent stands for, [B, U, frames, H, W].

    The first stands for one frame, each further one for `temporal`, as causal autoencoders have it. A mask of
    one frame is of every frame.
    """
    if mask.shape[2] == 1:
        return mask.expand(-1, -1, frames, -1, -1)
    if mask.shape[2] != (frames - 1) * temporal + 1:
        raise ValueError(
            f"a video of {(frames - 1) * temporal + 1} frames needs masks of as many, got {tuple(mask.shape)}"
        )
    later = mask[:, :, 1:].reshape(*mask.shape[:2], frames - 1, temporal, *mask.shape[3:])
    return torch.cat([mask[:, :, :1], later.mean(3)], 2)


def _on_latent(mask: Tensor, site: Sequence[int]) -> Tensor:
    """Masks [B, U, F, H, W] as shares of the latent's places, [B, U, *site]; area is kept."""
    if len(site) == 2 and mask.shape[2] != 1:
        raise ValueError(f"an image has one frame, but the masks are {tuple(mask.shape)}")
    flat = mask.flatten(0, 1) if len(site) == 2 else mask.flatten(0, 1)[:, None]
    return F.interpolate(flat, size=tuple(site), mode="area")[:, 0].reshape(*mask.shape[:2], *site)
