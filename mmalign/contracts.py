"""What the loop asks of the parts that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeGuard, get_args, runtime_checkable

from torch import Tensor, nn

from mmalign.copies import Copies
from mmalign.records import (
    Evaluation,
    Halted,
    Outcome,
    Pick,
    Plan,
    Prompts,
    RewardSignal,
    State,
    Trajectory,
    Where,
)

Media = Tensor | list[str]
Key = tuple[int | str, ...]  # names a stream of random numbers: (seed, purpose, iteration, ...)


class RewardError(RuntimeError):
    """A reward that cannot be trained on; the message names it and says what it did."""


class RolloutError(RuntimeError):
    """Another engine that does not write as it should; the message says what it did and what to try."""


@dataclass
class Forwards:
    """Sample-forwards of the policy's network so far: one row of one batch counts 1, guidance doubles it.

    train counts the forwards that gradients flow through; reference those of frozen copies; sample all
    others.
    """

    sample: int = 0
    train: int = 0
    reference: int = 0


class Policy(Protocol):
    """A model that samples, that can say how likely its actions were, and that knows where they lie.

    module: the network that forwards run through; the trainer replaces it by its wrapped (DDP, FSDP) form.
    """

    module: nn.Module
    copies: Copies
    forwards: Forwards

    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        """Sample without gradients; equal keys and equal (group, member) give equal samples in any batch."""
        ...

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        """All unmasked actions of the samples `rows` [b], in forwards of at most `size` network rows."""
        ...

    def evaluate(self, trajectory: Trajectory, pick: Pick, guidance: float | None = None) -> Evaluation:
        """How likely the picked actions are under the present parameters, with gradients if enabled.

        guidance: classifier-free guidance of this forward; None is the policy's own.
        """
        ...

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        """Footprint [B, U, S, *site] of units placed on the outcome, or broadcastable to it."""
        ...

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trainable parameters in the format that the plain library loads.

        state: the whole network's state dict, where its parameters are sharded over ranks.
        """
        ...

    def load(self, folder: Path) -> None:
        """Take the trainable parameters from what `save` wrote; ValueError where they do not fit."""
        ...


@runtime_checkable
class DrawsOn(Protocol):
    """A policy that objectives can differentiate through, from where `Plan.halt` halted it to its media."""

    def halted(self, trajectory: Trajectory, pick: Pick) -> Halted:
        """Where the picked samples were halted, and where they ended."""
        ...

    def velocity(self, trajectory: Trajectory, pick: Pick, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity of any states x [n, *latent] at sigma (scalar) for the prompts of the picked samples.

        One forward a sample, with gradients if enabled.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Media in [0, 1] of clean latents [n, *latent], with gradients if enabled."""
        ...


@runtime_checkable
class TellsPrecision(Protocol):
    """A policy that tells at which precision its forwards, and with them its gradients, are computed."""

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16; where it is fp16, losses are scaled (`mmalign.loss_scale`)."""
        ...


@runtime_checkable
class KeepsStep(Protocol):
    """A policy that makes more forwards for some samples than for others, as texts differ in length.

    anyone: whether any process says yes, to be asked by all before each forward that not all would make.
    The trainer sets it where a forward takes all processes, each of which holds a part of the weights; else
    it gives back what it is asked.
    """

    anyone: Callable[[bool], bool]


@runtime_checkable
class ReadsInPart(Protocol):
    """A policy that tells whether a forward may leave some of its trained weights unread.

    Ranks that exchange gradients wait for those of all weights but the ones that they look for in vain.
    """

    in_part: bool


@runtime_checkable
class TellsStates(Protocol):
    """A policy that tells the states in which its actions were taken."""

    def states(self, trajectory: Trajectory, pick: Pick) -> State:
        """Latent, time and pooled text of the picked actions; no gradient, no forward of the network."""
        ...


@runtime_checkable
class TellsNext(Protocol):
    """A policy that draws its actions from a vocabulary, and tells the distributions they were drawn from."""

    def distributions(
        self, trajectory: Trajectory, rows: Tensor, size: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Log-probabilities of all that could have been drawn, under the present parameters.

        For actions of the samples `rows` [b], at most `size` columns at a time: which columns, and
        [b, columns, V]. No gradient. Undefined where the mask is False.
        """
        ...


@runtime_checkable
class Writes(Protocol):
    """A policy whose samples are texts."""

    forwards: Forwards

    def texts(self, prompts: Prompts, key: Key) -> list[str]:
        """A text for each prompt, drawn without recording actions; equal keys give equal texts."""
        ...


@runtime_checkable
class KnowsReferences(Protocol):
    """A policy that can say how likely the references of prompts are."""

    def reference_log_prob(self, prompts: Prompts) -> Tensor:
        """Of a token of each prompt's reference in the mean, [B] in nats on the CPU; no gradient."""
        ...


class RewardModel(Protocol):
    """Scores outcomes, at whatever grain it can."""

    name: str

    def __call__(self, outcome: Outcome) -> RewardSignal: ...


@runtime_checkable
class PairwiseReward(Protocol):
    """A judge that compares two samples of one prompt; `mmalign.pairwise` makes win rates of its verdicts."""

    name: str
    both_orders: bool  # ask for each pair twice, either sample first: a preference for a place cancels out

    def prefer(self, prompts: Prompts, first: Media, second: Media) -> Tensor:
        """How far the first sample of each pair is preferred, [n]: 1, 0, or 1/2 for a tie; NaN: no verdict.

        first, second: n images [n, C, H, W], videos, or strings, made for the same n prompts.
        """
        ...


@runtime_checkable
class GroupReward(Protocol):
    """A reward that may need the whole group of a sample to judge it, as a judge of pairs elsewhere does."""

    name: str
    compares: bool  # whether it does; else it judges each sample by itself

    def __call__(self, outcome: Outcome) -> RewardSignal: ...


Reward = RewardModel | PairwiseReward


def judges_alone(reward: Reward) -> TypeGuard[RewardModel]:
    """Whether a reward has a verdict on a sample by itself, without the others of its group."""
    return not isinstance(reward, PairwiseReward) and not (
        isinstance(reward, GroupReward) and reward.compares
    )


@runtime_checkable
class LearnedReward(Protocol):
    """A reward that is itself trained between updates of the policy, and whose state is checkpointed."""

    name: str

    def __call__(self, outcome: Outcome) -> RewardSignal: ...

    def fit(self, outcome: Outcome) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, object]) -> None: ...


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward that is a differentiable function of the media."""

    name: str

    def __call__(self, outcome: Outcome) -> RewardSignal: ...

    def differentiate(self, outcome: Outcome) -> Tensor:
        """One value a row of the media, [B * views], equal to that of a call; gradients reach the media.

        A row without a verdict has value and gradient 0.
        """
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A reward that looks at what prompts bring along before anything is drawn."""

    name: str

    def read_ahead(self, prompts: Prompts) -> None:
        """ValueError where a prompt brings nothing that it can be judged by; it names the prompt or file."""
        ...


@runtime_checkable
class LatentReward(Protocol):
    """A reward that is a differentiable function of noisy latents, so that nothing has to be decoded."""

    name: str

    def __call__(self, outcome: Outcome) -> RewardSignal: ...

    def on_latents(self, prompts: Prompts, z: Tensor, sigma: Tensor) -> Tensor:
        """One value a sample, [n]; z: [n, *latent] as the policy has them, at sigma (scalar).

        Gradients reach z. A sample without a verdict has value and gradient 0.
        """
        ...


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters by peft, always kept in fp32."""

    rank: int = 32  # raise it for more capacity, lower it for less memory; 0 trains all weights
    alpha: int = 64  # scale of the adapter is alpha / rank
    targets: tuple[str, ...] = ()  # module name endings; empty: the adapter's own list


@dataclass(frozen=True)
class TextSettings:
    """How a model that writes, writes. Flow models have no use for it."""

    max_tokens: int = 64  # longest text; what is longer is cut off there
    temperature: float = 1.0  # of the distribution that is sampled from and learned; below 1 is less varied
    # Draw from the likeliest tokens that hold this share of the probability. Ratios stay those of the whole
    # distribution, so that below 1 the samples are no longer quite the policy's own: leave it at 1 to train.
    top_p: float = 1.0
    share_prefix: bool = True  # read picture and prompt once for a whole group, in sampling and in the update

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


Server = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class RolloutSettings:
    """Another engine that writes the texts of training, behind an OpenAI-compatible endpoint."""

    url: str = ""  # up to and with the version, http://localhost:8000/v1; empty: the captioner writes itself
    server: Server = "vllm"  # what answers there: engines load adapters and tell tokens in ways of their own
    model: str = ""  # name by which the server knows the base model; empty: policy.model
    folder: str = ""  # where adapters are written for the server to read, by the same path
    adapter: str = "mmalign"  # beginning of the names of adapters in the server
    key: str = "OPENAI_API_KEY"  # environment variable that holds the key, where one is needed
    parallel: int = 64  # texts that are asked for at the same time
    timeout: float = 300.0  # seconds after which a request has failed
    retries: int = 3  # further tries of a request that failed
    pause: float = 1.0  # seconds before the first of them; doubles
    cap: float = 2.0  # bound on the importance weight of a token; 1 only ever weakens tokens
    # Largest mean |log p - log b| of an iteration's tokens before the run stops: the server has then other
    # weights, another processor or another way of sampling. Raise it for quantized servers.
    limit: float = 0.3

    def __post_init__(self) -> None:
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if self.server not in get_args(Server):
            raise ValueError(f"server must be one of {', '.join(get_args(Server))}, got {self.server!r}")
        if self.url and not self.url.rstrip("/").endswith("/v1"):
            raise ValueError(f"url must end in the version, /v1, got {self.url!r}")
        if self.url and not self.folder:
            raise ValueError("folder must name where adapters are written for the server to read")
        for name in ("retries", "pause"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("parallel", "timeout", "limit", "cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class PolicySettings:
    """Which model is trained, and at what size and precision it runs."""

    # Local folder or hub id: a pipeline in diffusers format, or a captioner in transformers format.
    model: str
    # Folder of a run or of one of its checkpoints whose weights training begins with, such as a warm start by
    # sft; of the same model and the same lora. null: those of the model.
    weights: str | None = None
    # Folder or hub id of an autoencoder in place of the model's own, of the same class and latents: one that
    # works in fp16, or that can draw what the model is to learn. null: its own.
    vae: str | None = None
    height: int | None = None  # pixels; null: the model's own size
    width: int | None = None  # pixels; null: the model's own size
    # Of a video that is drawn: its length, null: the model's own. Of one that a captioner reads: how many of
    # its frames, evenly over its length; null: all of them.
    frames: int | None = None
    guidance: float = 1.0  # classifier-free guidance in sampling and training; 1 is off and halves the cost
    # Guidance of the second expert (Wan 2.2 A14B), which draws at low noise, as `guidance_scale_2` of its
    # pipeline; null: as the first, and nothing where `guidance` is 1.
    low_noise_guidance: float | None = None
    negative_prompt: str = ""  # what guidance leads away from
    # What a guidance-distilled model (FLUX, HunyuanVideo) is told its guidance is, at no cost; null: what its
    # pipeline has by default. Its true classifier-free guidance is `guidance`.
    embedded_guidance: float | None = None
    # Fixed shift of the schedule, sigma = shift t / (1 + (shift - 1) t), as `shift` or `flow_shift` of the
    # model's scheduler; set it there as well in what is done with the model later. Raise it for more steps at
    # high noise, as larger media need them; null: the model's own, which may depend on the size.
    shift: float | None = None
    # 0 to 1: how far guided predictions are brought back to the size of unguided ones (SD, SDXL, HunyuanDiT,
    # LTX-Video); raise
    # it where guidance over-exposes.
    guidance_rescale: float = 0.0
    max_sequence_length: int = 256  # tokens of the T5 encoder, where the family has one
    # fp32, bf16 or fp16 for the frozen weights and the forward pass; what is trained stays in fp32. fp16
    # rounds less than bf16, so that ratios begin nearer 1, and overflows sooner; its losses are scaled.
    precision: str = "fp32"
    leave_out: tuple[str, ...] = ()  # components not to load: text_encoder_3 saves the memory of T5
    # Network rows of one forward in sampling, or texts written at once; raise it until the device is busy,
    # lower it if memory runs out: results stay the same.
    chunk: int = 64
    gradient_checkpointing: bool = False  # saves memory, costs a third more time in the update
    lora: LoraSettings = field(default_factory=LoraSettings)
    text: TextSettings = field(default_factory=TextSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
