"""A policy over any model that writes about a picture: its actions are the tokens of its texts.

What a model's input convention needs of its own is a `CaptionAdapter`; sampling, log-probabilities and places
are written here once. A group is one picture with one prompt, described several times. Picture and prompt are
read once for the whole group, in sampling and in the update: their keys and values are repeated for the
members, with their gradient, so that loss and gradient are those of separate forwards.

Log-probabilities are those of the distribution that texts are drawn from: at `temperature`, and without the
tokens that no text may hold (placeholders of pictures, padding). Only the cut of `top_p` is left out of them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmalign.contracts import Forwards, Key, PolicySettings, RolloutError, TextSettings
from mmalign.copies import Copies, is_sharded
from mmalign.pictures import Clip, asked, in_message, open_picture
from mmalign.pipelines.flow import (
    ADAPTER_FILE,
    DTYPES,
    PEFT_PREFIX,
    add_lora,
    computing,
    take,
    write_adapter,
)
from mmalign.pipelines.rollout_server import Request, RolloutServer
from mmalign.pipelines.videos import open_video
from mmalign.randomness import generator, seed_of
from mmalign.records import (
    Behavior,
    Evaluation,
    Outcome,
    Pick,
    Plan,
    Prompts,
    Spans,
    Steps,
    Trajectory,
    Where,
    Whole,
)

Inputs = Mapping[str, Tensor]  # what a model reads of one picture and prompt, without a batch dimension
# Servers take what a request leaves open from the model's generation_config.
UNCUT = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
WEIGHTS = "model"  # folder of the weights where all of them are trained


@dataclass(frozen=True)
class Prefix:
    """Pictures and prompts as a model has read them.

    logits: [p, V] of the token that comes next. cache: keys and values, p rows. mask: [p, L], False where
    there is padding. position: [p], of the first token to come.
    """

    logits: Tensor
    cache: Any
    mask: Tensor
    position: Tensor


class CaptionAdapter(Protocol):
    """All that is particular to how a family of models is fed.

    model: the network. tokenizer: of its texts. lora_targets: names of the layers that get adapters, none of
    them in the vision tower. banned: tokens that no text may hold. ends: tokens that end a text; end: the one
    that references end with. processor: of its pictures and texts.
    """

    model: nn.Module
    tokenizer: Any
    processor: Any
    lora_targets: Sequence[str]
    banned: Sequence[int]
    ends: Sequence[int]

    @property
    def end(self) -> int: ...

    def encode(self, prompt: str, picture: Any) -> Inputs:
        """What the model reads of a prompt and a PIL picture or `Video`; ValueError where it has no place."""
        ...

    def prefix(self, network: nn.Module, inputs: Sequence[Inputs]) -> Prefix:
        """Read pictures and prompts by one call of `network`, with gradients if enabled."""
        ...

    def extend(
        self, network: nn.Module, prefix: Prefix, rows: Tensor | None, tokens: Tensor, past: int
    ) -> tuple[Tensor, Prefix]:
        """Logits [n, T, V] after each of tokens [n, T], which follow `past` tokens already in the cache.

        rows: [n], the row of the prefix that each continues, None for its own. The prefix that comes back
        holds the tokens as well, with n rows; only the mask and position stay those of the prompt.
        """
        ...


def kept(settings: PolicySettings) -> torch.dtype:
    """How the weights of a captioner are read: at its precision where they are frozen, else in fp32."""
    return DTYPES[settings.precision] if settings.lora.rank else torch.float32


class CaptionPolicy:
    """A captioner as a policy.

    chunk: texts written at once; raise it until the device is busy, lower it if memory runs out. seed: of the
    first LoRA weights.

    `replay` holds token [B, S] and, in characters of the text, where each token begins and ends: start, end
    [B, S]. The token that ends a text is an action; it has no characters.
    """

    def __init__(
        self,
        adapter: CaptionAdapter,
        settings: PolicySettings,
        device: torch.device | str = "cpu",
        *,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        if settings.lora.rank < 0:
            raise ValueError(f"policy.lora.rank must be 0 (all weights) or more, got {settings.lora.rank}")
        if settings.gradient_checkpointing:
            raise ValueError(
                "policy.gradient_checkpointing drops the keys and values that a captioner shares inside a "
                "group; lower training.batch to save memory"
            )
        self.server = _engine(settings, adapter)
        self.adapter, self.settings, self.text = adapter, settings, settings.text
        self.device, self.chunk = torch.device(device), chunk
        self.forwards = Forwards()
        self.anyone: Callable[[bool], bool] = bool  # replaced where other processes must keep step
        self.cached_inputs = 1024  # pictures and prompts whose inputs are kept; raise it to hold all of a run
        self._cache: OrderedDict[tuple[str, str | Clip], Inputs] = OrderedDict()
        self._network = cast(Any, adapter.model)
        self._network.requires_grad_(False).eval().to(self.device)
        if settings.lora.rank:
            add_lora(self._network, settings.lora, settings.lora.targets or adapter.lora_targets, seed)
        else:
            self._network.requires_grad_(True)
        self._banned = torch.tensor(sorted(set(adapter.banned)), dtype=torch.int64, device=self.device)
        self._ends = torch.tensor(sorted(set(adapter.ends)), dtype=torch.int64, device=self.device)
        self.module: nn.Module = self._network
        self.copies = Copies(self._network)

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def in_part(self) -> bool:
        """Some read a layer of their vision tower that is not its last."""
        return not self.settings.lora.rank

    # ---- sampling

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        """Write a text for each prompt, token by token; a text ends with its end token or at max_tokens.

        A plan of given texts takes the references of the prompts, whose log-probability is not known before
        the update and 0 here.
        """
        served = self.server is not None and not plan.given
        if plan.given:
            token, mask = self._given(prompts)
            likely = torch.zeros(token.shape, device=self.device)
        elif served:
            token, mask, likely = self._served(prompts, key)
        else:
            token, mask, likely = self._write(prompts, key, self.text)
        texts, start, end = self._read(token, mask)
        replay = {"token": token, "start": start, "end": end}
        trajectory = Trajectory(Outcome(prompts, texts), likely, mask, replay, plan)
        return self._weighed(trajectory) if served else trajectory

    @torch.no_grad()
    def texts(self, prompts: Prompts, key: Key, text: TextSettings | None = None) -> list[str]:
        """Texts alone; text: how they are written, None is the policy's own way."""
        token, mask, _ = self._write(prompts, key, text or self.text)
        return self._read(token, mask)[0]

    @torch.no_grad()
    def reference_log_prob(self, prompts: Prompts) -> Tensor:
        """Of a token of each prompt's reference in the mean, [B] in nats on the CPU."""
        trajectory = self.sample(prompts, Plan(1, given=True), ())
        return (self._likely(trajectory).sum(1) / trajectory.mask.sum(1)).cpu()

    def _likely(self, trajectory: Trajectory) -> Tensor:
        """How likely all actions are now, [B, S]."""
        found = torch.zeros(trajectory.log_prob.shape, device=self.device)
        for pick in self.picks(trajectory, torch.arange(len(trajectory)), self.chunk):
            found[pick.rows, pick.columns] = self.evaluate(trajectory, pick).log_prob.float()
        return found

    def _served(self, prompts: Prompts, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and log-probabilities of texts that the server writes with the present weights."""
        assert self.server is not None
        self.server.load(self._fingerprint(), self.save)
        shape = (len(prompts), self.text.max_tokens)
        token = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        likely = torch.zeros(shape)
        never = set(self.adapter.banned)
        for row, text in enumerate(self.server.write(self._requests(prompts, key))):
            count = len(text.tokens)
            odd = sorted(never & set(text.tokens))
            if count > shape[1] or odd:
                raise RolloutError(
                    f"policy.rollout: a text has {count} tokens, of at most {shape[1]}, and of the special "
                    f"ones {odd}; the server must keep to max_tokens and logit_bias"
                )
            token[row, :count] = torch.tensor(text.tokens)
            mask[row, :count] = True
            likely[row, :count] = torch.tensor(text.log_prob)
        return token.to(self.device), mask.to(self.device), likely.to(self.device)

    def _requests(self, prompts: Prompts, key: Key) -> list[Request]:
        """Each prompt as the server reads it, pictures as PNG in the message; members differ in seeds."""
        asked_for: dict[tuple[str, str], tuple[dict[str, Any], int]] = {}
        requests = []
        names = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
        for text, extra, name in zip(prompts.text, prompts.extra, names, strict=True):
            shown = _shown(text, extra)
            if not isinstance(shown, str):
                raise ValueError("policy.rollout: a server is asked about pictures, not videos")
            if (text, shown) not in asked_for:
                url = {"url": in_message(open_picture(shown))}
                content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
                body: dict[str, Any] = {
                    "messages": [{"role": "user", "content": content}],
                    "temperature": self.text.temperature,
                    **UNCUT,
                    "max_tokens": self.text.max_tokens,
                    "logit_bias": {str(number): -100 for number in self.adapter.banned},
                }
                asked_for[text, shown] = body, self._inputs(text, shown)["input_ids"].shape[1]
            body, read = asked_for[text, shown]
            requests.append(Request({**body, "seed": seed_of(*key, "token", *name) % 2**31}, read))
        return requests

    def _fingerprint(self) -> str:
        """The same for equal weights alone."""
        made = hashlib.blake2b(digest_size=16)
        for p in self._network.parameters():
            if p.requires_grad:
                if is_sharded(p):
                    raise ValueError("policy.rollout: sharded weights cannot be written for a server")
                made.update(p.detach().float().cpu().numpy().tobytes())
        return made.hexdigest()

    def _weighed(self, trajectory: Trajectory) -> Trajectory:
        """A trajectory of the server with the log-probabilities of this policy; it must be close to it."""
        rollout = self.settings.rollout
        likely = self._likely(trajectory)
        gap = float((likely - trajectory.log_prob)[trajectory.mask].abs().mean())
        if not gap <= rollout.limit:
            raise RolloutError(
                f"policy.rollout: log-probabilities of the server differ from those of this policy by "
                f"{gap:.3g} in the mean, more than policy.rollout.limit={rollout.limit:g}: it did not take "
                "the adapter, reads other pictures, or tells log-probabilities before temperature and "
                "logit_bias (vLLM needs --logprobs-mode processed_logprobs, SGLang an environment without "
                "SGLANG_RETURN_ORIGINAL_LOGPROB)"
            )
        return replace(trajectory, log_prob=likely, behavior=Behavior(trajectory.log_prob, rollout.cap))

    def _given(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Tokens and mask of the references, [B, S] each, with the token that ends a text."""
        shape = (len(prompts), self.text.max_tokens)
        token = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        never, tokenizer = set(self.adapter.banned), self.adapter.tokenizer
        for row, (prompt, extra) in enumerate(zip(prompts.text, prompts.extra, strict=True)):
            text = extra.get("reference")
            if not isinstance(text, str):
                raise ValueError(f'prompt {prompt!r} has no "reference" to learn from')
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], self.adapter.end][: shape[1]]
            if odd := [number for number in ids if number in never]:
                word = tokenizer.convert_ids_to_tokens(odd[0])
                raise ValueError(
                    f"the reference {text[:60]!r} holds {word!r}, which no text of this model may hold"
                )
            token[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        return token.to(self.device), mask.to(self.device)

    def _write(self, prompts: Prompts, key: Key, text: TextSettings) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and log-probabilities, [B, S] each."""
        shape, device = (len(prompts), text.max_tokens), self.device
        token = torch.zeros(shape, dtype=torch.int64, device=device)
        mask = torch.zeros(shape, dtype=torch.bool, device=device)
        likely = torch.zeros(shape, device=device)
        names = list(zip(prompts.group.tolist(), prompts.member.tolist(), strict=True))
        chance = torch.stack(
            [torch.rand(text.max_tokens, generator=generator(*key, "token", *name)) for name in names]
        ).to(device)
        for rows in torch.split(_grouped(prompts.group), self.chunk):
            here = rows.to(device)
            token[here], mask[here], likely[here] = self._continue(prompts.take(rows), chance[here], text)
        return token, mask, likely

    def _continue(self, prompts: Prompts, chance: Tensor, text: TextSettings) -> tuple[Tensor, ...]:
        """One batch of texts; rows that have ended leave it."""
        count, steps = chance.shape
        prefix, place = self._prefix(prompts)
        logits, rows = prefix.logits[place], cast(Tensor | None, place)
        token = torch.zeros(count, steps, dtype=torch.int64, device=self.device)
        mask = torch.zeros(count, steps, dtype=torch.bool, device=self.device)
        likely = torch.zeros(count, steps, device=self.device)
        alive = torch.arange(count, device=self.device)  # rows of the batch that the network still writes
        for step in range(steps):
            log_p = self._distribution(logits, text.temperature)
            drawn = draw(log_p, chance[alive, step], text.top_p)
            token[alive, step] = drawn
            mask[alive, step] = True
            likely[alive, step] = log_p.gather(1, drawn[:, None])[:, 0].float()
            open_ = ~torch.isin(drawn, self._ends)
            left = open_.nonzero()[:, 0]  # one wait for the device a token, as in any sampler
            if step == steps - 1 or not self.anyone(len(left) > 0):
                break
            if not len(left):
                self._accompany(prefix, rows, drawn, step, steps)
                break
            if len(left) < len(alive):
                alive, drawn = alive[left], drawn[left]
                rows = left if rows is None else rows[left]
            logits, prefix = self._extend(prefix, rows, drawn[:, None], step)
            self.forwards.sample += len(drawn)
            logits, rows = logits[:, -1], None
        return token, mask, likely

    def _accompany(self, prefix: Prefix, rows: Tensor | None, drawn: Tensor, step: int, steps: int) -> None:
        """Forwards of one row that nobody reads, from `step` on for as long as another process writes.

        Of sharded weights every process holds a part that the others need for their forwards.
        """
        row = torch.zeros(1, dtype=torch.int64, device=self.device) if rows is None else rows[:1]
        going, later = True, cast(Tensor | None, row)
        while going:
            _, prefix = self._extend(prefix, later, drawn[:1, None], step)
            self.forwards.sample += 1
            step, later = step + 1, None
            going = step < steps - 1 and self.anyone(False)

    def _prefix(self, prompts: Prompts) -> tuple[Prefix, Tensor]:
        """What the network has read of each distinct prompt, and which of them each sample continues [B]."""
        named = []
        for text, extra in zip(prompts.text, prompts.extra, strict=True):
            named.append((text, _shown(text, extra)))
        numbered: dict[object, int] = {}
        wanted = named if self.text.share_prefix else list(enumerate(named))
        place = [numbered.setdefault(name, len(numbered)) for name in wanted]
        distinct = [named[place.index(number)] for number in range(len(numbered))]
        with computing(self.settings, self.device):
            prefix = self.adapter.prefix(self.module, [self._inputs(*name) for name in distinct])
        return prefix, torch.tensor(place, device=self.device)

    def _extend(
        self, prefix: Prefix, rows: Tensor | None, tokens: Tensor, past: int
    ) -> tuple[Tensor, Prefix]:
        with computing(self.settings, self.device):
            return self.adapter.extend(self.module, prefix, rows, tokens, past)

    def _inputs(self, prompt: str, shown: str | Clip) -> Inputs:
        name = (prompt, shown)
        if name not in self._cache:
            seen = open_picture(shown) if isinstance(shown, str) else open_video(shown, self.settings.frames)
            self._cache[name] = self.adapter.encode(prompt, seen)
            if len(self._cache) > self.cached_inputs:
                self._cache.popitem(last=False)
        self._cache.move_to_end(name)
        return {part: tensor.to(self.device) for part, tensor in self._cache[name].items()}

    def _distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of what may be drawn, in fp32 or better."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return scores.index_fill(-1, self._banned, -torch.inf).log_softmax(-1)

    def _read(self, token: Tensor, mask: Tensor) -> tuple[list[str], Tensor, Tensor]:
        """The texts, and where in them each token stands."""
        texts, spans = [], torch.zeros(2, *token.shape, dtype=torch.int64)
        for row, (ids, length) in enumerate(zip(token.tolist(), mask.sum(1).tolist(), strict=True)):
            text, places = spelled(self.adapter.tokenizer, ids[:length])
            texts.append(text)
            spans[:, row, :length] = torch.tensor(places, dtype=torch.int64).T
        start, end = spans.to(token.device)
        return texts, start, end

    # ---- the update

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        """All tokens of at most `size` texts at a time, groups together and those of long texts first.

        Texts of one forward are padded to the longest of them.
        """
        mask, rows = trajectory.mask.cpu(), rows.cpu()
        for part in torch.split(rows[by_length(trajectory.group[rows].cpu(), mask[rows].sum(1))], size):
            place, column = mask[part].nonzero(as_tuple=True)
            yield Pick(part[place], column)

    def evaluate(self, trajectory: Trajectory, pick: Pick, guidance: float | None = None) -> Evaluation:
        """How likely the picked tokens are now; one network row a text."""
        if guidance not in (None, 1):
            raise ValueError(f"a captioner has no guidance, got {guidance}")
        rows, place = torch.unique(pick.rows.cpu(), return_inverse=True)
        longest = int(pick.columns.max()) + 1
        log_p = self._along(trajectory, rows, longest)
        at = (place.to(self.device), pick.columns.to(self.device))
        token = trajectory.replay["token"][pick.rows, pick.columns]
        return Evaluation(log_p[at].gather(1, token[:, None])[:, 0])

    @torch.no_grad()
    def distributions(
        self, trajectory: Trajectory, rows: Tensor, size: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """The distribution of each token of the texts `rows` [b], `size` columns at a time."""
        columns = trajectory.mask.shape[1]
        written = int(trajectory.mask[rows].any(0).sum())
        log_p = self._along(trajectory, rows.cpu(), max(1, written))
        for first in range(0, columns, size):
            part = log_p[:, first : first + size]
            short = min(size, columns - first) - part.shape[1]
            yield slice(first, min(first + size, columns)), nn.functional.pad(part, (0, 0, 0, short))

    def _along(self, trajectory: Trajectory, rows: Tensor, length: int) -> Tensor:
        """Log-probabilities [b, length, V] of what could have come at each place of the texts `rows` [b]."""
        counted = "train" if torch.is_grad_enabled() else "reference"
        setattr(self.forwards, counted, getattr(self.forwards, counted) + len(rows))
        prefix, place = self._prefix(trajectory.outcome.prompts.take(rows))
        logits = prefix.logits[place][:, None]
        if length > 1:
            token = trajectory.replay["token"][rows, : length - 1]
            later, _ = self._extend(prefix, place, token, 0)
            logits = torch.cat([logits, later], 1)
        return self._distribution(logits, self.text.temperature)

    # ---- places

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        """Footprint of units on the tokens: Spans of characters touch every token that has one of them."""
        start, end = trajectory.replay["start"], trajectory.replay["end"]
        if isinstance(where, Whole):
            return torch.ones(1, 1, start.shape[1], device=start.device)
        if isinstance(where, Steps):
            return nn.functional.one_hot(where.index.to(start.device), start.shape[1]).float()
        if isinstance(where, Spans):
            first, last = (edge.to(start.device)[..., None] for edge in (where.start, where.end))
            return ((start[:, None] < last) & (first < end[:, None])).float()
        raise TypeError(
            f"a captioner cannot place {type(where).__name__} on its tokens; it can place Whole, Steps, Spans"
        )

    # ---- guards

    @torch.no_grad()
    def check(self, prompts: Prompts) -> None:
        """Raise ValueError where the picture makes no difference to what the model would write.

        RolloutError where another engine is to write and cannot.
        """
        if self.server is not None:
            self.server.check()
        text, extra = next(zip(prompts.text, prompts.extra, strict=True))
        inputs = self._inputs(text, _shown(text, extra))
        # Almost black: pictures of zeros stand for padding in some families.
        blind = {
            part: torch.full_like(tensor, 1e-3) if tensor.is_floating_point() else tensor
            for part, tensor in inputs.items()
        }
        with computing(self.settings, self.device):
            seen, unseen = self.adapter.prefix(self.module, [inputs, blind]).logits.float()
        if torch.equal(seen, unseen):
            raise ValueError(
                f"policy.model: what {self.settings.model} writes does not depend on the picture; its "
                "processor and chat template must put the picture into the prompt"
            )

    # ---- files

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter that peft loads, or the whole model if all of it is trained.

        state: the network's gathered state dict, where its parameters are sharded over processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        whole = dict(state) if state else self._network.state_dict()
        if not self.settings.lora.rank:
            self._network.save_pretrained(folder / WEIGHTS, state_dict=whole)
            self.adapter.processor.save_pretrained(folder / WEIGHTS)  # so that it is a captioner of its own
            return
        layers = {name.replace(".default.", "."): t for name, t in whole.items() if ".lora_" in name}
        write_adapter(folder, self.settings, self.settings.lora.targets or self.adapter.lora_targets, layers)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the trainable parameters from what `save` wrote; they must fit exactly."""
        from safetensors.torch import load_file

        live = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        if self.settings.lora.rank:
            live = {saved_name(name): p for name, p in live.items()}
        place = folder / (ADAPTER_FILE if self.settings.lora.rank else WEIGHTS)
        if not place.exists():
            raise FileNotFoundError(f"there are no weights of this policy at {place}")
        if self.settings.lora.rank:
            saved = load_file(place)
        else:
            whole = type(self._network).from_pretrained(place, dtype=torch.float32)
            saved = {name: p for name, p in whole.named_parameters() if name in live}
        take(live, saved, folder)


def saved_name(name: str) -> str:
    """What peft calls a weight of an adapter in its files."""
    return PEFT_PREFIX + name.replace(".default.", ".")


def draw(log_p: Tensor, chance: Tensor, top_p: float = 1.0) -> Tensor:
    """A token of each distribution log_p [n, V] by its inverse at chance [n] in [0, 1)."""
    probability = log_p.double().exp()
    if top_p < 1:
        ordered, token = probability.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probability = probability.scatter(-1, token, ordered.masked_fill(outside, 0.0))
    heap = probability.cumsum(-1)
    reached = heap <= chance[:, None].double() * heap[:, -1:]
    return reached.sum(-1).clamp(max=log_p.shape[1] - 1)


def spelled(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and the characters [start, end) that each of them adds to it.

    Tokens are read together, because what one adds depends on those before it; a character that takes several
    tokens counts for the last of them.
    """

    def read(upto: int) -> str:
        said: str = tokenizer.decode(ids[:upto], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return said

    whole = read(len(ids))
    text = whole.strip()
    lead = len(whole) - len(whole.lstrip())
    edges = [0]
    for upto in range(1, len(ids) + 1):
        said = read(upto)
        known = len(said) if whole.startswith(said) else edges[-1]
        edges.append(max(edges[-1], known))
    inside = [min(max(edge - lead, 0), len(text)) for edge in edges]
    return text, list(pairwise(inside))


def by_length(group: Tensor, length: Tensor) -> Tensor:
    """Rows [B] with groups together, those whose longest text is longest first; group, length: [B]."""
    number = torch.unique(group, return_inverse=True)[1]
    longest = torch.zeros_like(number).scatter_reduce(0, number, length.to(number), "amax")[number]
    order = number.argsort(stable=True)
    return order[longest[order].argsort(descending=True, stable=True)]


def _engine(settings: PolicySettings, adapter: CaptionAdapter) -> RolloutServer | None:
    """Who writes the texts of training, if it is not the policy itself."""
    if not settings.rollout.url:
        return None
    if not settings.lora.rank or settings.text.top_p < 1:
        raise ValueError(
            "policy.rollout gives a server adapters and takes its log-probabilities, so that it needs "
            f"policy.lora.rank above 0 and policy.text.top_p=1, got {settings.lora.rank} and "
            f"{settings.text.top_p}"
        )
    if getattr(adapter.processor, "chat_template", None) is None:
        raise ValueError("policy.rollout asks by chat, and policy.model has no chat template")
    return RolloutServer(settings.rollout, settings.rollout.model or settings.model)


def _shown(text: str, extra: Mapping[str, object]) -> str | Clip:
    """The picture or video that a prompt asks about."""
    found = asked(extra)
    if found is None:
        raise ValueError(f'prompt {text!r} names no picture: it needs a path under "image" or "video"')
    return found


def _grouped(group: Tensor) -> Tensor:
    """The rows with groups together, in the order of their numbers."""
    return group.cpu().argsort(stable=True)
