"""DeScore: think, then score (arXiv:2605.05922). A video model reasons in words, and a head reads a number.

    thought = the model's own words on video and prompt, greedy
    score   = w . h(<Reward>),   h the last hidden state at a token that follows the thought; no bias

The words are not the score: what is sampled explains, what is regressed ranks. Training hides the thought of
a pair half of the time, so that the head can also score at once (`think: false`), for a fraction of the cost.
Scores drift over training, so that both ways are standardized by what `scripts/descore.py train` measured.

Any image-text-to-text model of transformers with a chat template will do; those that take no videos are shown
the frames as pictures. The weights are a folder:

    descore.json            model, token, instruction with {prompt}, frames, fps, longest, scale
    head.safetensors        weight [1, d], and token [d], the only embedding that is trained
    adapter_model.safetensors, adapter_config.json      LoRA, as peft writes it; may be missing
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import frames, texts
from mmalign.rewardmodels.precisions import DTYPES, Precision, dtype_of
from mmalign.rewardmodels.vlm_head import as_bytes

SAID, HEAD, ADAPTER, ADAPTER_SAID = (
    "descore.json",
    "head.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
PROMPT = "{prompt}"
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # a number for each token
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
VERDICT = re.compile(r"\"?([A-Za-z][\w -]*?)\"?\s*:\s*(-?\d+)(?!\.?\d)")  # 3, and not the 3 of 3.5
Inputs = Mapping[str, Tensor]  # what a processor makes of one video and its prompt


@dataclass(frozen=True)
class ThinkerSettings:
    """What a judge was trained as; it must be asked the same way."""

    model: str  # local folder or hub id
    instruction: str = PROMPT  # what it is asked, around the prompt of the video
    token: str = "<Reward>"  # whose state is scored; it is added to the words of the model
    frames: int = 8  # that are shown, from end to end; raise it for quick motion, lower it for less memory
    fps: float = 2.0  # at which they are said to follow each other, to models that ask
    longest: int = 1024  # tokens of a thought
    # Mean and deviation of its scores with a thought, then without.
    scale: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))

    def __post_init__(self) -> None:
        if self.instruction.count(PROMPT) != 1:
            raise ValueError(f"descore: the instruction must hold {PROMPT} once, got {self.instruction!r}")
        for name in ("frames", "fps", "longest"):
            if getattr(self, name) <= 0:
                raise ValueError(f"descore: {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Thought:
    """Tokens of a thought, and the one that ended it; None: it was cut off."""

    tokens: tuple[int, ...] = ()
    end: int | None = None


@dataclass(frozen=True)
class Reading:
    """What the model has made of videos and thoughts.

    score: [n]. hidden: [n, T, d], the states from which each of up to T tokens of the thought was drawn, the
    one that ends it included; empty if not asked for.
    """

    score: Tensor
    hidden: Tensor


class Thinker:
    """A model that thinks about videos, with the token and the head that score them."""

    def __init__(self, settings: ThinkerSettings, precision: Precision = "fp32") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

        self.settings = settings
        try:
            self.processor: Any = AutoProcessor.from_pretrained(settings.model)
            self.network: Any = AutoModelForImageTextToText.from_pretrained(
                settings.model, dtype=DTYPES[precision]
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"descore: model {settings.model} does not load: {error}") from error
        if self.processor.chat_template is None:
            raise ValueError(f"descore: model {settings.model} has no chat template, so it cannot be asked")
        words = self.processor.tokenizer
        words.add_tokens([settings.token], special_tokens=True)
        self.token = int(words.convert_tokens_to_ids(settings.token))
        rows, width = self.network.get_input_embeddings().weight.shape
        if len(words) > rows:
            self.network.resize_token_embeddings(len(words), mean_resizing=False)
        named = self.network.generation_config.eos_token_id
        found = {*(named if isinstance(named, list) else [named]), words.eos_token_id} - {None}
        if not found:
            raise ValueError(f"descore: model {settings.model} names no token that ends a text")
        self.ends = sorted(int(number) for number in found)
        special = {number for number, token in words.added_tokens_decoder.items() if token.special}
        self.banned = sorted(({*words.all_special_ids, *special, self.token}) - set(self.ends))
        self.end = (
            self.ends[0] if words.eos_token_id is None else int(words.eos_token_id)
        )  # of a given thought
        self.pad = self.end if words.pad_token_id is None else int(words.pad_token_id)
        # Penalties and cuts of its own would draw thoughts from another distribution than `log_probs`.
        self.network.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.pad)
        self.network.eval().requires_grad_(False)
        self.head = nn.Linear(width, 1, bias=False).requires_grad_(False)
        nn.init.normal_(self.head.weight, std=width**-0.5, generator=torch.Generator().manual_seed(0))
        average = self.network.get_input_embeddings().weight[:rows].float().mean(0)
        self.row = nn.Parameter(average, requires_grad=False)  # of the token, at first as any word
        self.network.get_input_embeddings().register_forward_hook(self._own_row)
        self._twice: list[nn.Module] = []

    @classmethod
    def load(cls, folder: str, model: str | None = None, precision: Precision = "fp32") -> Thinker:
        """What training wrote, with its adapter merged; model: where its base lies now."""
        judge = cls(settings_of(folder, model), precision)
        judge.take(Path(folder))
        if (Path(folder) / ADAPTER).is_file():
            state, rank, alpha = adapter_of(Path(folder))
            merge(judge.network, state, alpha / rank)
        return judge

    def take(self, folder: Path) -> None:
        """The head and the token's row from a folder."""
        from safetensors.torch import load_file

        if not (folder / HEAD).is_file():
            raise ValueError(f"descore: {folder} holds no {HEAD}, so it judges nothing")
        state = load_file(folder / HEAD)
        for name, own in (("weight", self.head.weight), ("token", self.row)):
            if name not in state or state[name].shape != own.shape:
                raise ValueError(
                    f"descore: {folder / HEAD} needs {name!r} of shape {tuple(own.shape)} for the model "
                    f"{self.settings.model}, got {tuple(state[name].shape) if name in state else 'none'}"
                )
            own.data.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Settings, head and row; the adapter is for who trains it."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = {"weight": self.head.weight, "token": self.row}
        save_file({name: p.detach().cpu().contiguous() for name, p in state.items()}, folder / HEAD)
        (folder / SAID).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def to(self, device: torch.device | str) -> Thinker:
        self.network.to(device)
        self.head.to(device)
        self.row.data = self.row.data.to(device)
        return self

    def checkpoint_gradients(self) -> None:
        """From now on layers keep nothing for a gradient but what goes in, and are computed twice."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        self._twice = [
            part for part in self.network.modules() if isinstance(part, GradientCheckpointingLayer)
        ]

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Inside alone that holds: a layer that is computed twice keeps no cache, and drawing needs one."""
        for layer in self._twice:
            layer.training = True  # the layer alone: what is in it stays without dropout
        try:
            yield
        finally:
            for layer in self._twice:
                layer.training = False

    def _own_row(self, _: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.where((given[0] == self.token)[..., None], self.row.to(out.dtype), out)

    # ---- asking

    def encode(self, video: Tensor, prompt: str) -> Inputs:
        """What the model reads of one video [F, 3, H, W] in [0, 1] and its prompt; a first axis of 1."""
        shown = [*as_bytes(video[shown_of(len(video), self.settings.frames)].cpu())]
        films = getattr(self.processor, "video_processor", None) is not None
        part: list[Mapping[str, Any]] = [{"type": "video"}] if films else [{"type": "image"}] * len(shown)
        asked = {"type": "text", "text": self.settings.instruction.replace(PROMPT, prompt)}
        told = self.processor.apply_chat_template(
            [{"role": "user", "content": [*part, asked]}], add_generation_prompt=True, tokenize=False
        )
        media: dict[str, Any] = {"images": shown}
        if films:
            about = {
                "total_num_frames": len(shown),
                "fps": self.settings.fps,
                "frames_indices": list(range(len(shown))),
                "duration": len(shown) / self.settings.fps,
            }
            media = {"videos": [shown], "video_metadata": [about], "do_sample_frames": False}
        begins = self.processor.tokenizer.bos_token
        if begins is not None and told.startswith(begins):
            media["add_special_tokens"] = False
        read = self.processor(text=[told], return_tensors="pt", **media)
        inputs = {name: tensor for name, tensor in read.items() if isinstance(tensor, Tensor)}
        if not any(tensor.is_floating_point() for tensor in inputs.values()):
            raise ValueError(f"descore: the chat template of {self.settings.model} gives a video no place")
        return inputs

    @torch.no_grad()
    def think(self, asked: Sequence[Inputs], temperature: float = 0.0, seed: int = 0) -> list[Thought]:
        """A thought on each, greedy at temperature 0; one of `longest` tokens is cut off."""
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        device = self.network.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            found = self.network.generate(
                **self._together(asked, [()] * len(asked), left=True),
                do_sample=temperature > 0,
                max_new_tokens=self.settings.longest,
                suppress_tokens=self.banned,
                **sampling,
            )
        first = max(one["input_ids"].shape[1] for one in asked)
        return [self._ended(row) for row in found[:, first:].tolist()]

    def _ended(self, row: Sequence[int]) -> Thought:
        stop = next((i for i, number in enumerate(row) if number in self.ends), None)
        return Thought(tuple(row[:stop]), None if stop is None else row[stop])

    def words(self, thought: Sequence[int]) -> str:
        return str(self.processor.tokenizer.decode(thought, clean_up_tokenization_spaces=False))

    def spell(self, text: str) -> tuple[int, ...]:
        """The tokens of a given thought; ValueError where it holds one that no thought may hold."""
        found: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if odd := sorted({*found} & {*self.banned, *self.ends}):
            word = self.processor.tokenizer.convert_ids_to_tokens(odd[0])
            raise ValueError(
                f"descore: the reasoning {text[:60]!r} holds {word!r}, which no thought may hold"
            )
        return tuple(found)

    def read(
        self, asked: Sequence[Inputs], thoughts: Sequence[Sequence[int]], along: bool = False
    ) -> Reading:
        """Scores after given thoughts; an empty one is none. along: also the states along the thought."""
        tails = [(*thought, self.token) for thought in thoughts]
        with self._checkpointed():
            states = self.network.model(**self._together(asked, tails), use_cache=False).last_hidden_state
        begin = torch.tensor([one["input_ids"].shape[1] for one in asked], device=states.device)
        length = torch.tensor([len(thought) for thought in thoughts], device=states.device)
        row = torch.arange(len(asked), device=states.device)
        score = self.head(states[row, begin + length].float())[:, 0]
        if not along:
            return Reading(score, states[:, :0])
        steps = torch.arange(int(length.max()) + 1, device=states.device)
        at = (begin[:, None] - 1 + steps).clamp(max=states.shape[1] - 1)
        return Reading(score, states[row[:, None], at])

    def log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens [n, T] drawn from states [n, T, d], without those that no thought may hold; [n, T]."""
        logits = self.network.get_output_embeddings()(hidden).float()
        logits[..., self.banned] = -torch.inf
        found: Tensor = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return found

    def _together(
        self, asked: Sequence[Inputs], tails: Sequence[Sequence[int]], left: bool = False
    ) -> dict[str, Tensor]:
        """Questions with the tokens that follow each, padded to one length, on the device."""
        longest = max(one["input_ids"].shape[1] + len(tail) for one, tail in zip(asked, tails, strict=True))
        rows: dict[str, list[Tensor]] = {}
        for one, tail in zip(asked, tails, strict=True):
            more = {"input_ids": torch.tensor(tail, dtype=torch.int64)[None]}
            more["attention_mask"] = torch.ones_like(more["input_ids"])
            for name, tensor in one.items():
                if name in TOKENS:
                    after = more.get(name, torch.zeros_like(more["input_ids"]))
                    tensor = torch.cat([tensor.cpu(), after.to(tensor.dtype)], 1)
                    short = longest - tensor.shape[1]
                    edge = (short, 0) if left else (0, short)
                    tensor = F.pad(tensor, edge, value=self.pad if name == "input_ids" else 0)
                elif tensor.is_floating_point():
                    tensor = tensor.to(self.network.dtype)
                rows.setdefault(name, []).append(tensor)
        return {name: torch.cat(found).to(self.network.device) for name, found in rows.items()}


@dataclass(eq=False)
class DeScore:
    """How well a video does what its prompt asks, by a model that thinks first; mean 0, deviation 1."""

    weights: str  # folder that scripts/descore.py train wrote
    model: str | None = None  # what it was trained from, if it lies elsewhere now; local folder or hub id
    think: bool = True  # false: score without reasoning, many times faster
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 8  # videos at once; lower it for less memory
    cached: int = 4096  # thoughts that are kept, so that a video is thought about once
    name = "descore"

    def __post_init__(self) -> None:
        dtype_of(self.name, self.precision)
        if self.batch < 1 or self.cached < 0:
            raise ValueError(
                f"descore: batch must be at least 1 and cached 0 or more, got {self.batch}, {self.cached}"
            )
        self._judge = Thinker.load(self.weights, self.model, self.precision)
        self._thoughts: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos, prompts = frames(self.name, outcome), texts(outcome)
        self._judge.to(videos.device)
        raw: list[Tensor] = []
        thoughts: list[tuple[int, ...]] = []
        for i in range(0, len(videos), self.batch):
            some, said = videos[i : i + self.batch], prompts[i : i + self.batch]
            asked = [self._judge.encode(video, prompt) for video, prompt in zip(some, said, strict=True)]
            names = [name_of(video, prompt) for video, prompt in zip(some, said, strict=True)]
            new: list[tuple[int, ...]] = self._think(names, asked) if self.think else [()] * len(asked)
            raw.append(self._judge.read(asked, new).score)
            thoughts += new
        mean, std = self._judge.settings.scale[0 if self.think else 1]
        score = torch.cat(raw)
        details: list[Mapping[str, object]] = []
        for value, thought in zip(score.tolist(), thoughts, strict=True):
            text = self._judge.words(thought)
            details.append({"raw": value, "reasoning": text, "dimensions": answer_of(text)})
        return RewardSignal(self.name, ((score - mean) / std)[:, None], details=details)

    def _think(self, names: Sequence[bytes], asked: Sequence[Inputs]) -> list[tuple[int, ...]]:
        """The thought on each question, from the cache where it is known."""
        new = {name: one for name, one in zip(names, asked, strict=True) if name not in self._thoughts}
        written = self._judge.think(list(new.values())) if new else []
        found = {name: thought.tokens for name, thought in zip(new, written, strict=True)}
        thoughts = [found[name] if name in found else self._thoughts[name] for name in names]
        for name, thought in zip(names, thoughts, strict=True):
            self._thoughts[name] = thought
            self._thoughts.move_to_end(name)
        while len(self._thoughts) > self.cached:
            self._thoughts.popitem(last=False)
        return thoughts


def shown_of(total: int, count: int) -> list[int]:
    """The numbers of up to `count` frames of a video of `total`, evenly from its first to its last."""
    return [round(float(number)) for number in torch.linspace(0, total - 1, min(count, total))]


def name_of(video: Tensor, prompt: str) -> bytes:
    """The same for equal videos and prompts alone."""
    made = hashlib.blake2b(f"{tuple(video.shape)} {prompt}".encode(), digest_size=16)
    made.update(as_bytes(video).cpu().contiguous().numpy().tobytes())
    return made.digest()


def settings_of(folder: str, model: str | None = None) -> ThinkerSettings:
    """What a folder of weights says; model: in place of the one that it names."""
    file = Path(folder) / SAID
    if not file.is_file():
        raise ValueError(f"descore: there is no {file}; scripts/descore.py train writes one")
    said = json.loads(file.read_text())
    known = {field.name for field in fields(ThinkerSettings)}
    if odd := sorted(said.keys() ^ known):
        raise ValueError(f"descore: {file} must name {', '.join(sorted(known))}; {', '.join(odd)} differs")
    said["scale"] = tuple(tuple(pair) for pair in said["scale"])
    return ThinkerSettings(**said | ({"model": model} if model else {}))


def adapter_of(folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """The weights of a folder's adapter as peft names them, its rank and its alpha."""
    from safetensors.torch import load_file

    for name in (ADAPTER, ADAPTER_SAID):
        if not (folder / name).is_file():
            raise ValueError(f"descore: {folder} has no {name}")
    said = json.loads((folder / ADAPTER_SAID).read_text())
    return load_file(folder / ADAPTER), int(said["r"]), int(said["lora_alpha"])


@torch.no_grad()
def merge(network: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    """Adds an adapter as peft names it to the weights: W + scale B A (arXiv:2106.09685)."""
    weights, start, end = dict(network.named_parameters()), "base_model.model.", ".lora_A.weight"
    for key, low in state.items():
        if not key.endswith(end):
            continue
        place = key.removeprefix(start).removesuffix(end)
        high = state.get(f"{start}{place}.lora_B.weight")
        weight = weights.get(f"{place}.weight")
        if high is None or weight is None or weight.shape != (high.shape[0], low.shape[1]):
            raise ValueError(f"descore: the adapter's {place} does not fit the model; is it another one?")
        weight.add_((scale * high.float() @ low.float()).to(weight))


def answer_of(text: str) -> dict[str, int] | None:
    """What a thought says in the end of each dimension; None where there is no answer.

    Read from <answer>name: number, ...</answer>, or from JSON between the marks; scores are whole numbers.
    """
    found = ANSWER.findall(text)
    verdicts = {name.strip(): int(score) for name, score in VERDICT.findall(found[-1])} if found else {}
    return verdicts or None
