"""A policy over any flow model: one denoising loop, one replay, one way to place credit.

What a model family needs of its own is a `FlowAdapter`; everything else is written here once. A group is one
prompt sampled several times, and its members share work wherever the plan lets them: texts are encoded once,
members that start from one noise are one sample up to their first action, and actions taken in one state
share one forward, in sampling and in the update. The gradient is the same, because every member's loss sees
the weights through that one velocity.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import Forwards, Key, LoraSettings, PolicySettings
from mmalign.copies import Copies
from mmalign.randomness import generator, normals
from mmalign.records import (
    Drawn,
    Evaluation,
    Masks,
    Noised,
    Outcome,
    Pick,
    Plan,
    Prompts,
    Steps,
    Trajectory,
    Where,
    Whole,
)
from mmalign.sde import Noise, euler, log_prob, transition
from mmalign.solvers import Estimate, compressed, multistep

Condition = Mapping[str, Tensor]  # what the network sees of a text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA_FILE = "pytorch_lora_weights.safetensors"
RECORDED = ("x", "x_next", "sigma", "sigma_next", "state", "mean", "log_prob")  # of every action
DECODED_PLACES = 2**14  # of latents decoded at once: four images of 512x512 keep a device busy and fit


class FlowAdapter(Protocol):
    """All that is particular to a family of flow models.

    Latents are [n, C, *place] in fp32, whatever the network makes of them (packing them into tokens is the
    adapter's own affair). pipeline: the diffusers pipeline, whose class writes LoRA files. network: its
    denoiser. lora_targets: endings of the names of the layers that get adapters.
    """

    pipeline: Any
    network: nn.Module
    lora_targets: tuple[str, ...]

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """[C, *place] of one sample; None is the model's own size; ValueError if the size does not fit."""
        ...

    def encode(self, text: str) -> Condition:
        """What the network sees of one text, without a batch dimension; all texts give equal shapes."""
        ...

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The schedule [steps + 1] for latents of this shape, falling to exactly 0."""
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
        """Media of clean latents, [n, 3, H, W] or [n, F, 3, H, W] with values in [0, 1]."""
        ...


def guided(both: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in fp32; both: velocities of the negative half, then of the positive half."""
    negative, positive = both.float().chunk(2)
    return negative + guidance * (positive - negative)


def state_ids(group: Tensor, member: Tensor, step: int, shared: bool) -> Tensor:
    """A number for the state in which an action is taken, [B] int64: equal if and only if the states are one.

    It speaks of (group, step) where members share the state, else of (group, member, step), and so means the
    same on every rank and in every slice.
    """
    for name, value, bits in (
        ("group", group, 31),
        ("member", member, 19),
        ("step", torch.tensor([step]), 12),
    ):
        if len(value) and not 0 <= int(value.min()) <= int(value.max()) < 2**bits:
            raise ValueError(f"{name} numbers must lie in 0..2^{bits} - 1, got {value.tolist()}")
    who = torch.zeros_like(member) if shared else member + 1
    return group * 2**32 + who * 2**12 + step


@dataclass(frozen=True)
class _Texts:
    """Encoded texts of n rows: tensors [distinct, ...], every row's place there [n]; a negative is last."""

    tensors: Condition
    place: Tensor

    def at(self, place: Tensor) -> Condition:
        return {name: tensor[place] for name, tensor in self.tensors.items()}


class FlowPolicy:
    """A flow model as a policy: its actions are the stochastic denoising steps.

    by_site: keep one log-probability per place of the latent, so that `locate` can place Masks; a policy with
    ratios per place has another objective, with its own clip range. chunk: network rows of one forward in
    sampling; raise it until the device is busy, lower it if memory runs out. seed: of the first LoRA weights.

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
        by_site: bool = False,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        if settings.guidance < 1:
            raise ValueError(f"policy.guidance must be 1 (off) or more, got {settings.guidance}")
        if settings.lora.rank < 0:
            raise ValueError(f"policy.lora.rank must be 0 (all weights) or more, got {settings.lora.rank}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least one network row, got {chunk}")
        self.adapter, self.settings, self.noise = adapter, settings, noise
        self.device, self.by_site, self.chunk = torch.device(device), by_site, chunk
        self.shape = adapter.latent_shape(settings.height, settings.width)
        self.forwards = Forwards()
        self.cached_texts = 256  # raise it to hold all prompts of a run; an SD3.5 text is 3 MB in bf16
        self._cache: OrderedDict[str, Condition] = OrderedDict()
        self._schedules: dict[int, Tensor] = {}
        self._network = cast(Any, adapter.network)
        for part in adapter.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
                part.eval()
                part.to(self.device)
        if settings.lora.rank:
            add_lora(self._network, settings.lora, settings.lora.targets or adapter.lora_targets, seed)
        else:
            self._network.float().requires_grad_(True)
        if settings.gradient_checkpointing:
            self._network.enable_gradient_checkpointing()
        self.module: nn.Module = self._network
        self.copies = Copies(self._network)

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        """Sample by the plan: the ODE, noise drawn at `plan.stochastic` and recorded at `plan.sde_steps`."""
        if plan.stochastic and self.noise.level == 0:
            raise ValueError(
                f"noise.level is 0, zero SDE noise with an SDE algorithm: steps {plan.stochastic} are to be "
                "stochastic; give it a level above 0, or a plan without sde_steps"
            )
        sigmas, guidance, samples = self._schedule(plan.steps), self.settings.guidance, len(prompts)
        # Until the first action a row is a group where noise is shared, and a sample otherwise.
        shared = plan.share_noise
        lead, row = _leaders(prompts) if shared else (torch.arange(samples), torch.arange(samples))
        x, texts = (
            self._prior(prompts.take(lead), shared, key),
            self._texts(prompts.take(lead).text, guidance),
        )
        streams = [generator(*key, "noise", *name) for name in _names(prompts)]
        record: dict[str, list[Tensor]] = {name: [] for name in RECORDED}
        start, before = max(plan.stochastic, default=-1) + 1, None
        for step in range(start):
            velocity = self._velocity(x, sigmas[step].expand(len(x)), texts, guidance)
            if step not in plan.stochastic:
                x = euler(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            state = state_ids(prompts.group, prompts.member, step, shared)
            if shared:  # one velocity for the group; from here on its members part
                x, velocity, texts, shared = x[row], velocity[row], self._texts(prompts.text, guidance), False
            sigma, sigma_next = sigmas[step].expand(samples), sigmas[step + 1].expand(samples)
            moved = transition(x, velocity, sigma, sigma_next, self.noise, sigmas[1])
            x_next = moved.mean + moved.std * normals(streams, self.shape, self.device)
            if step in plan.sde_steps:
                likely = log_prob(x_next, moved, self.noise, self._dims)
                values = (x, x_next, sigma, sigma_next, state, moved.mean, likely)
                for name, value in zip(RECORDED, values, strict=True):
                    record[name].append(value)
            x, before = x_next, Estimate(x - sigmas[step] * velocity, sigmas[step])
        if plan.tail:
            views = [self._multistep(x, texts, compressed(sigmas[start:], plan.tail), before, guidance)]
        else:
            views = self._finish(x, texts, sigmas, start, plan.strides, guidance)
        if shared:  # nothing was drawn: the members are one to the end
            views = [view[row] for view in views]
        media = self._decode(torch.stack(views, 1).flatten(0, 1))
        replay = {name: torch.stack(values, 1) for name, values in record.items() if values}
        if plan.renoise:
            replay = self._renoise(prompts, views[0], plan.renoise, sigmas, key)
        site, actions = self.shape[1:] if self.by_site else (), len(plan.sde_steps) or plan.renoise
        recorded = replay.pop("log_prob", torch.zeros(samples, actions, *site, device=self.device))
        replay["guard"] = sigmas[1].expand(samples)
        mask = torch.ones(samples, actions, dtype=torch.bool, device=self.device)
        return Trajectory(Outcome(prompts, media, len(plan.strides)), recorded, mask, replay)

    def _renoise(
        self, prompts: Prompts, clean: Tensor, times: int, sigmas: Tensor, key: Key
    ) -> dict[str, Tensor]:
        """Finished latents noised again, one time drawn in each of `times` equal parts of the schedule."""
        streams = [generator(*key, "renoise", *name) for name in _names(prompts)]
        drawn = torch.stack([torch.rand(times, generator=stream) for stream in streams]).to(self.device)
        place = (torch.arange(times, device=self.device) + drawn) / times * (len(sigmas) - 1)
        low = place.long().clamp(max=len(sigmas) - 2)
        sigma = torch.lerp(sigmas[low], sigmas[low + 1], place - low)  # [B, times]
        noise = normals(streams, (times, *self.shape), self.device)
        share = sigma.reshape(*sigma.shape, *[1] * len(self.shape))
        x = (1 - share) * clean[:, None] + share * noise
        state = torch.stack([state_ids(prompts.group, prompts.member, i, False) for i in range(times)], 1)
        return {"x": x, "sigma": sigma, "state": state, "clean": clean}

    @torch.no_grad()
    def images(
        self,
        prompts: Prompts,
        steps: int,
        key: Key,
        guidance: float | None = None,
        tuned: float = 1.0,
    ) -> Tensor:
        """Media sampled by the ODE alone, [B, 3, H, W]; guidance: None is the policy's own.

        tuned: the share of the steps, from the noise on, that is not left to the base model.
        """
        guidance = self.settings.guidance if guidance is None else guidance
        x, texts = self._prior(prompts, False, key), self._texts(prompts.text, guidance)
        sigmas, turn = self._schedule(steps), round(tuned * steps)
        if turn:
            x = self._finish(x, texts, sigmas[: turn + 1], 0, (1,), guidance)[0]
        if turn < steps:
            with self._base():
                x = self._finish(x, texts, sigmas[turn:], 0, (1,), guidance)[0]
        return self._decode(x)

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Run without the adapters, as the model was before training."""
        if not self.settings.lora.rank:
            raise ValueError(
                "evaluation.tuned below 1 needs the base model, which policy.lora.rank=0 (all weights are "
                "trained) does not keep"
            )
        self._network.disable_adapters()
        try:
            yield
        finally:
            self._network.enable_adapters()

    def _prior(self, prompts: Prompts, shared: bool, key: Key) -> Tensor:
        names = [name[:1] if shared else name for name in _names(prompts)]
        return normals([generator(*key, "initial", *name) for name in names], self.shape, self.device)

    def _finish(
        self, x: Tensor, texts: _Texts, sigmas: Tensor, start: int, strides: Sequence[int], guidance: float
    ) -> list[Tensor]:
        """Follow the ODE from step `start` to the end, once per stride; all completions move in one batch.

        They leave from one state, so their first forward is one as well.
        """
        end = len(sigmas) - 1
        paths = [[*range(start, end, stride), end] for stride in strides]
        views = [x] * len(paths)
        for hop in range(max(map(len, paths)) - 1):
            going = [i for i, path in enumerate(paths) if hop + 1 < len(path)]
            if hop == 0:
                velocities = [self._velocity(x, sigmas[start].expand(len(x)), texts, guidance)] * len(going)
            else:
                sigma = torch.cat([sigmas[paths[i][hop]].expand(len(x)) for i in going])
                batch = _Texts(texts.tensors, texts.place.repeat(len(going)))
                together = self._velocity(torch.cat([views[i] for i in going]), sigma, batch, guidance)
                velocities = list(together.chunk(len(going)))
            for i, velocity in zip(going, velocities, strict=True):
                views[i] = euler(views[i], velocity, sigmas[paths[i][hop]], sigmas[paths[i][hop + 1]])
        return views

    def _multistep(
        self, x: Tensor, texts: _Texts, sigmas: Tensor, before: Estimate | None, guidance: float
    ) -> Tensor:
        """Follow the ODE along `sigmas` with steps of second order."""
        for sigma, sigma_next in pairwise(sigmas):
            velocity = self._velocity(x, sigma.expand(len(x)), texts, guidance)
            x, before = multistep(x, velocity, sigma, sigma_next, before)
        return x

    def _schedule(self, steps: int) -> Tensor:
        if steps not in self._schedules:
            sigmas = self.adapter.sigmas(steps, self.shape).float()
            if (
                len(sigmas) != steps + 1
                or sigmas[0] > 1
                or sigmas[-1] != 0
                or bool((sigmas.diff() >= 0).any())
            ):
                raise ValueError(f"a schedule of {steps} steps must fall to exactly 0, got {sigmas.tolist()}")
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
        places = torch.split(texts.place, size)
        parts = zip(torch.split(x, size), torch.split(sigma, size), places, strict=True)
        return torch.cat([self._forward(*part, texts, guidance) for part in parts])

    def _forward(self, x: Tensor, sigma: Tensor, place: Tensor, texts: _Texts, guidance: float) -> Tensor:
        negative = texts.at(torch.full_like(place, -1)) if self.adapter.rows(guidance) == 2 else None
        with self._autocast():
            velocity = self.adapter.velocity(self.module, x, sigma, texts.at(place), negative, guidance)
        return velocity.float()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.settings.precision])

    def _texts(self, texts: Sequence[str], guidance: float) -> _Texts:
        """The encoded texts of some rows, with the negative one where guidance asks for it."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        negative = [self.settings.negative_prompt] if self.adapter.rows(guidance) == 2 else []
        encoded = [self._encode(text) for text in [*place, *negative]]
        return _Texts(
            {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]},
            torch.tensor([place[text] for text in texts]).to(self.device),
        )

    @torch.no_grad()
    def _encode(self, text: str) -> Condition:
        """One text at a time: its numbers must not depend on neighbors, which differ in a resumed run."""
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        condition = {name: tensor.to(self.device) for name, tensor in self.adapter.encode(text).items()}
        self._cache[text] = condition
        if len(self._cache) > self.cached_texts:
            self._cache.popitem(last=False)
        return condition

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
        state = _distinct(trajectory.replay["state"][row, column])[1]
        states = max(1, size // self.adapter.rows(self.settings.guidance))
        for first in range(0, int(state.max()) + 1, states):
            inside = (state >= first) & (state < first + states)
            yield Pick(row[inside], column[inside])

    def evaluate(self, trajectory: Trajectory, pick: Pick) -> Evaluation:
        """How likely the picked actions are now, by one forward of their distinct states.

        The forward counts as train with gradients enabled and as reference otherwise.
        """
        replay, rows, columns = trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
        first, inverse = _distinct(replay["state"][rows, columns])
        guidance, text = self.settings.guidance, trajectory.outcome.prompts.text
        count = len(first) * self.adapter.rows(guidance)
        if torch.is_grad_enabled():
            self.forwards.train += count
        else:
            self.forwards.reference += count
        x, sigma = replay["x"][rows, columns], replay["sigma"][rows, columns]
        texts = self._texts([text[i] for i in rows[first].tolist()], guidance)
        velocity = self._forward(x[first], sigma[first], texts.place, texts, guidance)[inverse]
        if "clean" in replay:
            noised = Noised(x, replay["clean"][rows], sigma.reshape(-1, *[1] * len(self.shape)))
            return Evaluation(trajectory.log_prob[rows, columns], velocity=velocity, noised=noised)
        sigma_next, x_next = replay["sigma_next"][rows, columns], replay["x_next"][rows, columns]
        moved = transition(x, velocity, sigma, sigma_next, self.noise, replay["guard"][rows])
        likely = log_prob(x_next, moved, self.noise, self._dims)
        drawn = Drawn(replay["mean"][rows, columns], x_next)
        return Evaluation(likely, moved.mean, moved.std, velocity, moved.step, slope=moved.slope, drawn=drawn)

    @property
    def _dims(self) -> tuple[int, ...]:
        return (1,) if self.by_site else tuple(range(1, len(self.shape) + 1))

    # ---- places

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        """Footprint of units on the denoising steps, and with by_site on the places of the latent."""
        actions = trajectory.log_prob
        site = actions.shape[2:]
        if isinstance(where, Whole):
            return torch.ones(1, 1, 1, *[1] * len(site), device=actions.device)
        if isinstance(where, Steps):
            steps = torch.arange(actions.shape[1], device=actions.device)
            hit = (where.index.to(actions.device)[..., None] == steps).float()
            return hit.reshape(*hit.shape, *[1] * len(site))
        if isinstance(where, Masks) and self.by_site:
            return _on_latent(where.mask.to(actions.device).float(), site)[:, :, None]
        raise TypeError(
            f"a flow policy cannot place {type(where).__name__} on its denoising steps; it can place Whole, "
            "Steps and, with by_site=True, Masks"
        )

    # ---- files

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the LoRA file that plain diffusers loads, or `transformer/` where all weights are trained.

        state: the network's gathered state dict, where its parameters are sharded over processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not self.settings.lora.rank:
            part = folder / ".transformer.part"
            shutil.rmtree(part, ignore_errors=True)
            self._network.save_pretrained(part, state_dict=state) if state else self._network.save_pretrained(
                part
            )
            shutil.rmtree(folder / "transformer", ignore_errors=True)
            part.rename(folder / "transformer")
            return
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self._network, state_dict=dict(state) if state else None)
        part_name = f"part.{LORA_FILE}"
        type(self.adapter.pipeline).save_lora_weights(
            folder,
            transformer_lora_layers={name: t.detach().cpu().contiguous() for name, t in layers.items()},
            transformer_lora_adapter_metadata=self._network.peft_config["default"].to_dict(),
            weight_name=part_name,
        )
        os.replace(folder / part_name, folder / LORA_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the trainable parameters from what `save` wrote; they must fit exactly."""
        from safetensors.torch import load_file

        live = self._network.state_dict()
        if self.settings.lora.rank:
            lora = {name: p for name, p in live.items() if ".lora_" in name}
            live = {"transformer." + name.replace(".default.", "."): p for name, p in lora.items()}
            files = [folder / LORA_FILE]
        else:
            files = sorted((folder / "transformer").glob("*.safetensors")) or [folder / "transformer"]
        if not files[0].is_file():
            raise FileNotFoundError(f"there are no weights of this policy at {files[0]}")
        saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
        shapes, wanted = ({name: tuple(t.shape) for name, t in state.items()} for state in (saved, live))
        if odd := sorted(set(shapes.items()) ^ set(wanted.items())):
            raise ValueError(
                f"{files[0].parent} does not fit this policy (policy.lora, policy.model) in {len(odd)} "
                f"tensors, such as {odd[0]}"
            )
        for name, p in live.items():
            p.copy_(saved[name])


def add_lora(network: Any, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Put fp32 adapters on the layers whose names end with one of `targets`; at first they change nothing.

    Weights are Gaussian as in the literature (A ~ N(0, 1 / rank^2), B = 0), from streams named by the layer,
    so that they are the same on every rank and device and at every precision.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        try:
            network.add_adapter(config)
        except ValueError as error:
            raise ValueError(f"policy.lora.targets: {list(targets)} fit no layer: {error}") from error
    for name, p in network.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
            if ".lora_A." in name:
                p.data.copy_(normals([generator(seed, "lora", name)], p.shape)[0] / settings.rank)


def _names(prompts: Prompts) -> list[tuple[int, int]]:
    return list(zip(prompts.group.tolist(), prompts.member.tolist(), strict=True))


def _leaders(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The first row of each group, and for every row the place of its group among them."""
    first: dict[int, int] = {}
    groups = prompts.group.tolist()
    for i, group in enumerate(groups):
        text, own = prompts.text[first.setdefault(group, i)], prompts.text[i]
        if text != own:
            raise ValueError(f"group {group} shares its noise but not its prompt: {text!r} and {own!r}")
    place = {group: k for k, group in enumerate(first)}
    return torch.tensor([*first.values()]), torch.tensor([place[group] for group in groups])


def _distinct(state: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct state first occurs, by rising state, and the place of every entry's state there."""
    values, inverse = torch.unique(state, return_inverse=True)
    places = torch.arange(len(state))
    return torch.full_like(values, len(state)).scatter_reduce(0, inverse, places, "amin"), inverse


def _on_latent(mask: Tensor, site: Sequence[int]) -> Tensor:
    """Masks [B, U, F, H, W] as shares of the latent's places, [B, U, *site]; area is kept."""
    if len(site) == 2 and mask.shape[2] != 1:
        raise ValueError(f"an image has one frame, but the masks are {tuple(mask.shape)}")
    flat = mask.flatten(0, 1) if len(site) == 2 else mask.flatten(0, 1)[:, None]
    return F.interpolate(flat, size=tuple(site), mode="area")[:, 0].reshape(*mask.shape[:2], *site)
