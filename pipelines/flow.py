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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import Forwards, Key, LoraSettings, PolicySettings
from mmalign.copies import Copies
from mmalign.randomness import generator, normals
from mmalign.records import (
    Evaluation,
    Masks,
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

Condition = Mapping[str, Tensor]  # what the network sees of a text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORDED = ("x", "x_next", "sigma", "sigma_next", "state", "log_prob")  # of every action
LORA_FILE = "pytorch_lora_weights.safetensors"
DECODED_PIXELS = (
    2**21
)  # decoded at once, 8 images of 512x512: enough to keep a device busy, little enough to fit


class FlowAdapter(Protocol):
    """All that is particular to a family of flow models.

    Latents are [n, C, *place] in fp32, whatever the network makes of them (packing into tokens is the
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
    """Classifier-free guidance in fp32 from the velocities of the negative half and then the positive half."""
    negative, positive = both.float().chunk(2)
    return negative + guidance * (positive - negative)


def state_ids(group: Tensor, member: Tensor, step: int, shared: bool) -> Tensor:
    """A number for the state in which an action is taken, [B] int64: equal if and only if the states are one.

    It speaks of (group, step) where members share the state, else of (group, member, step), and so means the
    same on every rank and in every slice.
    """
    who = torch.zeros_like(member) if shared else member + 1
    return group * 2**32 + who * 2**12 + step


@dataclass(frozen=True)
class _Texts:
    """Encoded texts of n rows: tensors [distinct, ...] and each row's place among them [n]; the negative is last."""

    tensors: Condition
    place: Tensor

    def at(self, place: Tensor) -> Condition:
        return {name: tensor[place] for name, tensor in self.tensors.items()}


class FlowPolicy:
    """A flow model as a policy: its actions are the stochastic denoising steps.

    by_site: keep one log-probability per place of the latent, so that `locate` can place Masks; a policy with
    per-place ratios has another objective, with its own clip range. chunk: network rows of one forward in
    sampling. seed: of the initial LoRA weights.
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
        if settings.precision not in DTYPES:
            raise ValueError(
                f"policy.precision must be one of {', '.join(DTYPES)}, got {settings.precision!r}"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least one network row, got {chunk}")
        self.adapter, self.settings, self.noise = adapter, settings, noise
        self.device, self.by_site, self.chunk = torch.device(device), by_site, chunk
        self.shape = adapter.latent_shape(settings.height, settings.width)
        self.forwards = Forwards()
        self.cached_texts = (
            256  # raise it to hold all prompts of a run; an SD3.5 text with T5 is 3 MB in bf16
        )
        self._cache: OrderedDict[str, Condition] = OrderedDict()
        self._network = adapter.network
        for part in adapter.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(self.device)
        if settings.lora.rank:
            add_lora(self._network, settings.lora, settings.lora.targets or adapter.lora_targets, seed)
        else:
            self._network.float().requires_grad_(True)
        if settings.gradient_checkpointing:
            self._network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.module: nn.Module = self._network
        self.copies = Copies(self._network)

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        """Sample by the plan: the ODE, with noise drawn and recorded at `plan.sde_steps`."""
        if plan.sde_steps and self.noise.level == 0:
            raise ValueError(
                f"noise.level is 0, which is zero SDE noise with an SDE algorithm (steps {plan.sde_steps} are "
                "stochastic); give it a level above 0, or a plan without sde_steps"
            )
        sigmas, guidance = self._schedule(plan.steps), self.settings.guidance
        samples = len(prompts)
        # Until the first action rows are groups where noise is shared, and samples otherwise.
        lead, row = _leaders(prompts) if plan.share_noise else (torch.arange(samples), torch.arange(samples))
        x, texts = (
            self._prior(prompts.take(lead), plan.share_noise, key),
            self._texts(prompts.take(lead).text),
        )
        streams = [generator(*key, "noise", g, m) for g, m in _names(prompts)]
        record: dict[str, list[Tensor]] = {name: [] for name in RECORDED}
        shared = plan.share_noise
        start = plan.sde_steps[-1] + 1 if plan.sde_steps else 0
        for step in range(start):
            velocity = self._velocity(x, sigmas[step].expand(len(x)), texts, guidance)
            if step not in plan.sde_steps:
                x = euler(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            state = state_ids(prompts.group, prompts.member, step, shared)
            if shared:  # one velocity for the group; from here on its members part
                x, velocity, texts, shared = x[row], velocity[row], self._texts(prompts.text), False
            sigma, sigma_next = sigmas[step].expand(samples), sigmas[step + 1].expand(samples)
            moved = transition(x, velocity, sigma, sigma_next, self.noise, sigmas[1])
            x_next = moved.mean + moved.std * normals(streams, self.shape, self.device)
            likely = log_prob(x_next, moved, self.noise, self._dims)
            for name, value in zip(record, (x, x_next, sigma, sigma_next, state, likely), strict=True):
                record[name].append(value)
            x = x_next
        views = self._finish(x, texts, sigmas, start, plan.strides, guidance)
        if shared:
            views = [view[row] for view in views]
        media = self._decode(torch.stack(views, 1).flatten(0, 1))
        replay = {name: torch.stack(values, 1) for name, values in record.items() if values}
        replay["guard"] = sigmas[1].expand(samples)
        site = self.shape[1:] if self.by_site else ()
        recorded = replay.pop("log_prob", torch.zeros(samples, 0, *site, device=self.device))
        mask = torch.ones(samples, len(plan.sde_steps), dtype=torch.bool, device=self.device)
        return Trajectory(Outcome(prompts, media, len(views)), recorded, mask, replay)

    @torch.no_grad()
    def images(self, prompts: Prompts, steps: int, key: Key, guidance: float | None = None) -> Tensor:
        """Media sampled by the ODE alone, [B, 3, H, W]; guidance: None is the policy's own."""
        guidance = self.settings.guidance if guidance is None else guidance
        x, texts = self._prior(prompts, False, key), self._texts(prompts.text, guidance)
        return self._decode(self._finish(x, texts, self._schedule(steps), 0, (1,), guidance)[0])

    def _prior(self, prompts: Prompts, shared: bool, key: Key) -> Tensor:
        names = [(g,) if shared else (g, m) for g, m in _names(prompts)]
        return normals([generator(*key, "initial", *name) for name in names], self.shape, self.device)

    def _finish(
        self, x: Tensor, texts: _Texts, sigmas: Tensor, start: int, strides: Sequence[int], guidance: float
    ) -> list[Tensor]:
        """Follow the ODE from step `start` to the end, once per stride; all completions move in one batch.

        They leave from one state, so that their first forward is one as well.
        """
        end = len(sigmas) - 1
        paths = [[*range(start, end, stride), end] for stride in strides]
        views = [x for _ in paths]
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

    def _schedule(self, steps: int) -> Tensor:
        sigmas = self.adapter.sigmas(steps, self.shape).to(torch.float32)
        if sigmas[-1] != 0 or not bool((sigmas.diff() < 0).all()):
            raise ValueError(f"the schedule of {steps} steps must fall to exactly 0, got {sigmas.tolist()}")
        return sigmas.to(self.device)

    def _decode(self, latents: Tensor) -> Tensor:
        first = self.adapter.decode(latents[:1])
        rows = max(1, DECODED_PIXELS // first[0].numel() * 3)
        return torch.cat(
            [first, *(self.adapter.decode(part) for part in latents[1:].split(rows) if len(part))]
        )

    # ---- the network

    def _velocity(self, x: Tensor, sigma: Tensor, texts: _Texts, guidance: float) -> Tensor:
        """Velocities [n, C, *place] in fp32, in forwards of at most `chunk` network rows; counted as sampling."""
        self.forwards.sample += len(x) * self.adapter.rows(guidance)
        size = max(1, self.chunk // self.adapter.rows(guidance))
        parts = zip(x.split(size), sigma.split(size), texts.place.split(size), strict=True)
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

    def _texts(self, texts: Sequence[str], guidance: float | None = None) -> _Texts:
        """The encoded texts of some rows, each distinct text encoded once and remembered."""
        guidance = self.settings.guidance if guidance is None else guidance
        distinct = list(dict.fromkeys(texts))
        negative = [self.settings.negative_prompt] if self.adapter.rows(guidance) == 2 else []
        encoded = [self._encode(text) for text in distinct + negative]
        place = {text: i for i, text in enumerate(distinct)}
        return _Texts(
            {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]},
            torch.tensor([place[text] for text in texts], device=self.device),
        )

    @torch.no_grad()
    def _encode(self, text: str) -> Condition:
        """One text at a time, so that its numbers never depend on its neighbors (a resumed run has others)."""
        if text in self._cache:
            self._cache.move_to_end(text)
        else:
            self._cache[text] = {name: t.to(self.device) for name, t in self.adapter.encode(text).items()}
            while len(self._cache) > self.cached_texts:
                self._cache.popitem(last=False)
        return self._cache[text]

    # ---- replay

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        """All unmasked actions of the samples `rows`, in forwards of at most `size` network rows.

        Actions taken in one state are never parted; states come in one order, whatever the order of `rows`.
        """
        rows = rows.cpu()
        place, column = trajectory.mask.cpu()[rows].nonzero(as_tuple=True)
        row = rows[place]
        _, state = trajectory.replay["state"][row, column].unique(return_inverse=True)
        states = max(1, size // self.adapter.rows(self.settings.guidance))
        for first in range(0, int(state.max()) + 1 if len(state) else 0, states):
            inside = (state >= first) & (state < first + states)
            yield Pick(row[inside], column[inside])

    def evaluate(self, trajectory: Trajectory, pick: Pick) -> Evaluation:
        """How likely the picked actions are now: one forward for their distinct states, one log-prob for each."""
        replay, rows, columns = trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
        distinct, inverse = replay["state"][rows, columns].unique(return_inverse=True)
        one = torch.full_like(distinct, len(rows)).scatter_reduce(0, inverse, torch.arange(len(rows)), "amin")
        prompts = trajectory.outcome.prompts.text
        texts = self._texts([prompts[i] for i in rows[one].tolist()])
        guidance = self.settings.guidance
        count = len(distinct) * self.adapter.rows(guidance)
        if torch.is_grad_enabled():
            self.forwards.train += count
        else:
            self.forwards.reference += count
        x, sigma = replay["x"][rows, columns], replay["sigma"][rows, columns]
        velocity = self._forward(x[one], sigma[one], texts.place, texts, guidance)[inverse]
        moved = transition(
            x, velocity, sigma, replay["sigma_next"][rows, columns], self.noise, replay["guard"][rows]
        )
        likely = log_prob(replay["x_next"][rows, columns], moved, self.noise, self._dims)
        return Evaluation(likely, moved.mean, moved.std, velocity, moved.step)

    @property
    def _dims(self) -> tuple[int, ...]:
        return (1,) if self.by_site else tuple(range(1, len(self.shape) + 1))

    # ---- places

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        """Footprint of units on the denoising steps, and on the latent's places where the policy keeps them."""
        actions = trajectory.log_prob
        site = actions.shape[2:]
        if isinstance(where, Whole):
            return torch.ones(1, 1, 1, *[1] * len(site), device=actions.device)
        if isinstance(where, Steps):
            steps = torch.arange(actions.shape[1], device=actions.device)
            hit = (where.index.to(actions.device)[..., None] == steps).float()
            return hit.reshape(*hit.shape, *[1] * len(site))
        if isinstance(where, Masks) and self.by_site:
            if len(site) == 2 and where.mask.shape[2] != 1:
                raise ValueError(f"an image has one frame, but Masks is {tuple(where.mask.shape)}")
            mask = where.mask.to(actions.device, torch.float32)
            flat = mask.flatten(0, 1)  # [B * U, F, H, W]
            if len(site) == 2:
                flat = F.interpolate(flat, size=site, mode="area")[:, 0]
            else:
                flat = F.interpolate(flat[:, None], size=site, mode="area")[:, 0]
            return flat.reshape(*mask.shape[:2], 1, *site)
        if isinstance(where, Masks):
            raise TypeError(
                "a flow policy with one log-probability per step cannot place Masks; it can with by_site=True"
            )
        raise TypeError(
            f"a flow policy cannot place {type(where).__name__} on its denoising steps; it can place Whole, Steps "
            "and, with by_site=True, Masks"
        )

    # ---- files

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the LoRA file that plain diffusers loads, or `transformer/` where all weights are trained.

        state: the network's gathered state dict, where its parameters are sharded over processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not self.settings.lora.rank:
            part = folder / ".transformer.part"
            self._network.save_pretrained(part, state_dict=state)  # type: ignore[operator]
            shutil.rmtree(folder / "transformer", ignore_errors=True)
            part.rename(folder / "transformer")
            return
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self._network, state_dict=dict(state) if state else None)
        part_name = f".{LORA_FILE}.part"
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

        if self.settings.lora.rank:
            names = {
                name: "transformer." + name.replace(".default.", ".")
                for name, p in self._network.named_parameters()
                if p.requires_grad
            }
            files = [folder / LORA_FILE]
        else:
            names = {name: name for name, _ in self._network.named_parameters()}
            files = sorted((folder / "transformer").glob("*.safetensors"))
        if not files or not files[0].is_file():
            raise FileNotFoundError(
                f"{folder} holds no weights of this policy: there is no {files or 'transformer'}"
            )
        state = {name: t for file in files for name, t in load_file(file).items()}
        if set(state) != set(names.values()):
            odd = sorted(set(state) ^ set(names.values()))
            raise ValueError(
                f"{folder} does not fit this policy: {len(odd)} tensors differ, such as {odd[0]}"
            )
        for name, p in self._network.named_parameters():
            if name in names:
                p.copy_(state[names[name]])


def add_lora(network: nn.Module, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Put fp32 adapters on the layers whose names end with `targets`; at first they change nothing.

    Weights are Gaussian as in the literature (A ~ N(0, 1/rank^2), B = 0), from a stream named by the layer,
    so that they are the same on every rank, device and precision.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        try:
            network.add_adapter(config)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"policy.lora.targets {list(targets)} fit no layer: {error}") from error
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        p.data = p.data.float()
        if ".lora_A." in name:
            p.data.copy_(normals([generator(seed, "lora", name)], p.shape)[0] / settings.rank)


def _names(prompts: Prompts) -> list[tuple[int, int]]:
    return list(zip(prompts.group.tolist(), prompts.member.tolist(), strict=True))


def _leaders(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The first row of each group, and every row's group by its place among them."""
    first: dict[int, int] = {}
    for i, group in enumerate(prompts.group.tolist()):
        lead = first.setdefault(group, i)
        if prompts.text[lead] != prompts.text[i]:
            raise ValueError(
                f"members of group {group} share their noise but not their prompt: {prompts.text[lead]!r} and "
                f"{prompts.text[i]!r}"
            )
    lead = list(first.values())
    place = {group: k for k, group in enumerate(first)}
    return torch.tensor(lead), torch.tensor([place[g] for g in prompts.group.tolist()])
