"""What a run will cost, before any weights are loaded: memory of a device, arithmetic, time, what to change.

The real network is run on the meta device, where tensors have shapes but no content: every byte that its
forward and backward keep alive is counted (`live_bytes`), and every multiplication (torch's own counter).
Attention counts as a fused kernel, which keeps no matrix of scores, and a convolution with the room that
its kernel works in (`turned`).

    weights      those of the networks, in the precision they are kept in
    trained      4 bytes a trained parameter, and as many for each frozen copy and each average
    gradients    4 bytes a trained parameter           optimizer    8 bytes (two moments of AdamW)
    activations  the most that forward and backward of one minibatch keep alive at once
    sampling     the most that a forward of `policy.chunk` rows keeps alive
    samples      states, means and next states of the actions of an iteration, on the device
    media        what the samples are decoded to, held until the update ends
    decoding     the most that decoding one chunk of latents keeps alive beside the media; or these once
                 more, as the chunks are joined
    kernels      in half precision on a CPU: those that oneDNN keeps of the products of matrices
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mmalign.assembly import check_kind, check_noise, compose, composed, cost_of, derive, of_captioners
from mmalign.autocast import Autocast, Device
from mmalign.config import ConfigError, RunConfig
from mmalign.data import PromptSource, read_prompts
from mmalign.pipelines.blueprint import META, blank_policy, blank_text, supposing
from mmalign.pipelines.flow import DECODED_PLACES, DTYPES, FlowPolicy, SeesPictures, sources_of
from mmalign.records import Plan

Sharding = Literal["ddp", "zero2", "zero3"]
SHARDINGS: dict[Sharding, str] = {
    "ddp": "DDP, nothing is shared out",
    "zero2": "DeepSpeed ZeRO-2, gradients and optimizer are",
    "zero3": "FSDP2 or DeepSpeed ZeRO-3, the weights as well",
}
RESERVED = 0.08  # share of a device that the runtime, its libraries and fragmentation take
GIB = 2**30
# What oneDNN keeps of a product of matrices in half precision while the process lives, whatever its sizes: a
# description of each of the 80 kernels that their tails may ask for (brgemm_matmul). The code comes on top.
KERNEL = 2**19


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of an iteration."""

    weights: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    samples: float
    media: float
    sampling: float
    decoding: float
    kernels: float

    @property
    def peak(self) -> float:
        """The update, the sampling or the decoding, whichever needs most, beside all that stays.

        Gradients stay as well: those of an update are dropped as the next one begins.
        """
        stays = self.weights + self.trained + self.gradients + self.optimizer + self.samples + self.kernels
        return stays + max(self.media + self.activations, self.sampling, self.media + self.decoding)


@dataclass(frozen=True)
class Work:
    """One iteration over all devices: network rows of each kind, their operations, the seconds they take."""

    sample: float
    train: float
    reference: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One network row, and the bytes that a minibatch keeps alive.

    forward_flops: of one row. plain, checkpointed: bytes of a minibatch without and with gradient
    checkpointing. sampling: bytes of a forward in sampling. decoding: bytes of one chunk beside its media.
    media: bytes of what one sample is decoded to. kernels: bytes that oneDNN keeps of its kernels, on a CPU.
    """

    parameters: int
    trained: int
    frozen_bytes: int
    forward_flops: float
    plain: float
    checkpointed: float
    sampling: float
    decoding: float
    media: float
    kernels: float


@dataclass(frozen=True)
class Estimate:
    """What `mmalign plan` tells."""

    measured: Measured
    memory: Mapping[Sharding, Memory]
    work: Work
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        peaks = {name: memory.peak for name, memory in self.memory.items()}
        return asdict(self) | {"peak": peaks}


# ---- counting


Product = tuple[Any, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]
PRODUCTS = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    )
)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make, for as long as anything holds them."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class Working(Live):  # type: ignore[no-untyped-call]
    """Live, and what convolutions take for themselves while they work.

    products: those of matrices in half precision there were, by sizes and strides of what they multiply.
    flops: operations so far, by the formulas of torch's counter, which is slower and counts the same.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__(known)
        self.products: set[Product] = set()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.now
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, before + _room(func, args, out))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if func in PRODUCTS and args[-1].dtype in (torch.bfloat16, torch.float16):
            self.products.add((func, tuple((tuple(one.shape), one.stride()) for one in args[:3])))
        return out


def turned(tensor: Tensor) -> int:
    """Bytes of a tensor [n, C, *place] in the layout of a convolution's kernel: C in blocks of 16.

    Networks hold channels first, kernels want them together: oneDNN's (torch's on a CPU) in blocks as wide as
    the vectors of the processor, cuDNN's for tensor cores last. Both turn input and output on every call.
    """
    channels = tensor.shape[1]
    return int(tensor.nbytes) // max(1, channels) * (-(-channels // 16) * 16)


def _room(func: Any, args: Any, out: Any) -> int:
    """Bytes that a convolution takes at its worst moment, its results among them; 0 for other operations.

    Input and output stand turned at once, and the weights; the output is turned back when the input is gone.
    """
    if func is torch.ops.aten.convolution.default:
        x, weight = args[:2]
        return int(weight.nbytes) + turned(out) + max(turned(x), int(out.nbytes))
    if func is torch.ops.aten.convolution_backward.default:
        (upper, x, weight), wanted = args[:3], args[-1]
        if wanted[0] and not wanted[1]:
            return int(weight.nbytes) + turned(x) + max(turned(upper), int(x.nbytes))
        # The gradient of the weights is taken last, beside that of the input.
        return int(weight.nbytes) + turned(upper) + turned(x) + (int(x.nbytes) if wanted[0] else 0)
    return 0


class _Fused(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def _fused_attention() -> Iterator[Callable[[], float]]:
    """Attention as a fused kernel has it; gives the floating-point operations of its products so far."""
    real, spent = F.scaled_dot_product_attention, [0.0]

    def fused(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        if has_torch_function((query, key, value)):
            given = (query, key, value)
            seen: Tensor = handle_torch_function(fused, given, *given, *rest, **named)
            return seen
        heads = math.prod(query.shape[:-2])
        spent[0] += 2 * heads * query.shape[-2] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        if key.shape[-3] != query.shape[-3]:  # grouped queries
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        out: Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
        return out

    fused.__name__ = real.__name__  # what Autocast knows it by
    F.scaled_dot_product_attention = fused
    try:
        yield lambda: spent[0]
    finally:
        F.scaled_dot_product_attention = real


@dataclass(frozen=True)
class Alive:
    """Bytes after a forward, and at the worst moment of it and its backward; operations of the forward.

    products: those of matrices in half precision, each kind once, see `Working`.
    """

    kept: float
    peak: float
    flops: float
    products: frozenset[Product]


def live_bytes(
    network: nn.Module, run: Callable[[], Tensor], backward: bool = True, accumulate: bool = False
) -> Alive:
    """What one forward of the network and its backward keep alive; parameters and gradients count nothing.

    run: the forward, on the meta device. accumulate: the gradients of an earlier minibatch are there already;
    else they come as the activations go, and peak is the most of both together less all gradients.
    """
    wanted = [p for p in network.parameters() if p.requires_grad and backward]
    for parameter in wanted:
        parameter.grad = torch.empty_like(parameter) if accumulate else None
    held = [p.grad for p in wanted if p.grad is not None]
    live = Working([*network.parameters(), *network.buffers(), *held])
    with _fused_attention() as spent, live:
        out = run()
        kept, flops = live.now, live.flops + spent()  # before the backward, which may compute some again
        if backward:
            out.float().square().mean().backward()  # type: ignore[no-untyped-call]
        peak = live.peak
    new = 0 if accumulate else sum(p.grad.nbytes for p in wanted if p.grad is not None)
    for parameter in wanted:
        parameter.grad = None
    return Alive(float(kept), float(peak - new), float(flops), frozenset(live.products))


def measure(
    policy: FlowPolicy,
    rows: int,
    samples: int,
    accumulate: bool = False,
    rest: int = 0,
    device: Device = "cuda",
    pictures: int = 0,
) -> Measured:
    """What the network of a policy without weights needs for a minibatch of so many rows, and to decode.

    samples: of an iteration on one device, which is the most that is drawn or decoded at once. accumulate:
    an update has several minibatches, see `live_bytes`. rest: rows of its last one, where these are fewer; 0
    where they are not. device: what runs it, which has operations of its own that autocast leaves in fp32.
    pictures: beside each text.
    """
    adapter, network = policy.adapter, policy.module
    text = blank_text(policy, pictures)
    guidance = policy.settings.guidance
    each = adapter.rows(guidance)
    size = max(1, rows // each)

    precision = DTYPES[policy.settings.precision]

    @contextmanager
    def casting() -> Iterator[None]:
        with supposing(policy), nullcontext() if precision == torch.float32 else Autocast(device, precision):
            yield

    def forward(count: int) -> Tensor:
        # Each row has a text of its own, as in a run.
        seen = {name: value.expand(count, *value.shape).clone() for name, value in text.items()}
        x, sigma = torch.empty(count, *policy.shape, device=META), torch.empty(count, device=META)
        with casting():
            found: Tensor = adapter.velocity(network, x, sigma, seen, seen if each == 2 else None, guidance)
        return found

    def update(count: int) -> Alive:
        return live_bytes(network, lambda: forward(count), accumulate=accumulate)

    def draw(count: int) -> Alive:
        with torch.no_grad():
            return live_bytes(network, lambda: forward(count), backward=False)

    _checkpointing(network, True, casting)
    again = update(size)
    _checkpointing(network, False)
    whole = update(size)
    rows_at_once = min(samples, max(1, policy.chunk // each))
    sampling = draw(rows_at_once)
    products = whole.products | sampling.products
    if device == "cpu" and products:
        products |= draw(left).products if (left := samples % rows_at_once) else frozenset()
        products |= update(left).products if (left := rest // each) else frozenset()
    _checkpointing(network, policy.settings.gradient_checkpointing)
    chunk = min(samples, max(1, DECODED_PLACES // math.prod(policy.shape[1:])))
    vae = adapter.pipeline.vae
    media = 0

    def decode() -> Tensor:
        nonlocal media
        found: Tensor = adapter.decode(torch.empty(chunk, *policy.shape, device=META))
        media = found.nbytes
        return found

    with torch.no_grad():
        decoding = live_bytes(vae, decode, backward=False)
    parts = [part for part in adapter.pipeline.components.values() if isinstance(part, nn.Module)]
    trained = [p for p in network.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for part in parts for p in part.parameters() if not p.requires_grad)
    return Measured(
        parameters=sum(p.numel() for p in network.parameters()),
        trained=sum(p.numel() for p in trained),
        frozen_bytes=frozen,
        forward_flops=whole.flops / (size * each),
        plain=whole.peak,
        checkpointed=again.peak,
        sampling=sampling.peak,
        decoding=decoding.peak - media,
        media=media / chunk,
        kernels=KERNEL * len(products) if device == "cpu" else 0.0,
    )


def _checkpointing(
    network: nn.Module, on: bool, again: Callable[[], AbstractContextManager[object]] = nullcontext
) -> None:
    """Turn gradient checkpointing on or off; again: around what is computed a second time."""
    for part in [network, *network.children()]:
        name = "enable_gradient_checkpointing" if on else "disable_gradient_checkpointing"
        switch: Any = getattr(part, name, None)
        if switch is not None:
            how = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))
            switch(*([how] if on else []))
    network.train(on)  # blocks are checkpointed in training alone


# ---- the estimate


def estimate(
    config: RunConfig,
    cost: Mapping[str, float],
    plans: list[Plan],
    copies: int,
    measured: Measured,
    shape: tuple[int, ...],
    gpus: int = 1,
    gpu_memory: float = 80.0,
    tflops: float = 990.0,
    utilization: float = 0.4,
) -> Estimate:
    """Memory, work and advice. cost: rows of an iteration by kind; copies: frozen copies and averages.

    gpu_memory: GiB of each device. tflops: what a device could do at the run's precision. utilization: the
    share of it that is reached.
    """
    if gpus < 1 or not gpu_memory > 0 or not tflops > 0 or not 0 < utilization <= 1:
        raise ConfigError(
            "--gpus must be at least 1, --gpu-memory and --gpu-tflops positive and --utilization in (0, 1], "
            f"got {gpus}, {gpu_memory}, {tflops}, {utilization}"
        )
    memory = {name: _memory(config, measured, plans, copies, shape, gpus, name) for name in SHARDINGS}
    # A backward is two forwards, or one where the gradient of frozen weights is not taken.
    trained = (2 if config.policy.lora.rank else 3) + config.policy.gradient_checkpointing
    rows = cost["sample"] + trained * cost["train"] + cost["reference"]
    flops = rows * measured.forward_flops
    work = Work(
        cost["sample"],
        cost["train"],
        cost["reference"],
        flops,
        flops / (tflops * 1e12 * utilization * gpus),
    )
    room = gpu_memory * GIB * (1 - RESERVED)
    return Estimate(measured, memory, work, _advice(config, measured, memory, room, gpus))


def _memory(
    config: RunConfig,
    measured: Measured,
    plans: list[Plan],
    copies: int,
    shape: tuple[int, ...],
    gpus: int,
    sharding: Sharding,
) -> Memory:
    n = measured.trained
    weights = gpus if sharding == "zero3" else 1
    states = gpus if sharding != "ddp" else 1
    each = -(-config.prompts.per_iteration * config.prompts.group // gpus)
    actions = sum(plan.actions for plan in plans)
    latent = 4 * math.prod(shape)
    # State, next state and mean of each action, and the finished sample.
    samples = each * latent * (3 * actions + 1)
    media = each * measured.media * sum(plan.views for plan in plans)
    return Memory(
        weights=measured.frozen_bytes / weights,
        trained=4 * n * (1 + copies) / weights,
        gradients=4 * n / states,
        optimizer=8 * n / states,
        activations=measured.checkpointed if config.policy.gradient_checkpointing else measured.plain,
        samples=samples,
        media=media,
        sampling=measured.sampling,
        decoding=max(measured.decoding, media),
        kernels=measured.kernels,
    )


def _advice(
    config: RunConfig, measured: Measured, memory: Mapping[Sharding, Memory], room: float, gpus: int
) -> list[str]:
    """What to change, by what it costs least, each with what it saves; nothing where the run fits."""
    now = memory["ddp"]
    if now.peak <= room:
        return []
    said: list[str] = [f"it needs {now.peak / GIB:.1f} GiB of {room / GIB:.1f}; in this order:"]
    policy = config.policy
    saved = measured.plain - measured.checkpointed
    if not policy.gradient_checkpointing and saved > 0.02 * GIB:
        said.append(
            f"policy.gradient_checkpointing=true saves {saved / GIB:.1f} GiB for a forward more in training"
        )
    update = max(now.activations, now.decoding) + now.media
    if now.sampling > update and policy.chunk > 1:
        fewer = max(1, int(policy.chunk * update / now.sampling))
        less = (now.sampling - max(update, now.sampling * fewer / policy.chunk)) / GIB
        said.append(f"policy.chunk={fewer} saves {less:.1f} GiB; results stay the same")
    if config.training.batch > 1:
        half = (measured.checkpointed if policy.gradient_checkpointing else measured.plain) / 2
        said.append(
            f"training.batch={config.training.batch // 2} saves {half / GIB:.1f} GiB; results stay the same"
        )
    if policy.precision == "fp32":
        said.append(f"policy.precision=bf16 saves {measured.frozen_bytes / 2 / GIB:.1f} GiB")
    if not policy.lora.rank:
        full = 16 * measured.trained / GIB
        said.append(f"policy.lora.rank=32 trains adapters alone: about {full:.1f} GiB less")
    if gpus > 1:
        for name in ("zero2", "zero3"):
            less = now.peak - memory[name].peak  # type: ignore[index]
            if less > 0.02 * GIB:
                said.append(f"{SHARDINGS[name]}: saves {less / GIB:.1f} GiB on each device")  # type: ignore[index]
    said.append("policy.height and policy.width: activations grow with their product")
    return said


# ---- the page


def page(found: Estimate, gpu_memory: float, gpus: int) -> str:
    """The estimate as text."""
    m, work = found.measured, found.work
    lines = [
        f"network              {m.parameters:,} parameters, of which {m.trained:,} are trained",
        f"one forward          {m.forward_flops / 1e12:.3g} TFLOP a row",
        f"activations          {m.plain / GIB:.2f} GiB a minibatch, {m.checkpointed / GIB:.2f} checkpointed",
        "",
        "GiB on each device   " + "".join(f"{name:>12}" for name in (*Memory.__dataclass_fields__, "peak")),
    ]
    for name, memory in found.memory.items():
        cells = "".join(f"{value / GIB:>12.2f}" for value in (*asdict(memory).values(), memory.peak))
        fits = "fits" if memory.peak <= gpu_memory * GIB * (1 - RESERVED) else "does NOT fit"
        lines.append(f"{name:<21}{cells}  {fits}")
    lines += [
        "",
        f"an iteration         {work.sample:,.0f} rows to sample, {work.train:,.0f} to train, at most "
        f"{work.reference:,.0f} of frozen copies",
        f"                     {work.flops / 1e15:.2f} PFLOP, {work.seconds:.1f} s on {gpus} device"
        + ("s" if gpus > 1 else "")
        + ", without rewards, decoding and texts",
    ]
    return "\n".join([*lines, *(["", *found.advice] if found.advice else [])])


HEAD = (
    "| recipe | denoiser | trained | TFLOP a row | peak GiB: DDP | ZeRO-2 | ZeRO-3, FSDP2 "
    "| rows to sample / train / of frozen copies | s an iteration |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def row(recipe: str, config: RunConfig, found: Estimate) -> str:
    """The estimate as a line of the table of docs/planning.md, which `scripts/plan_recipes.py` writes."""
    m, work = found.measured, found.work
    own = m.parameters - (m.trained if config.policy.lora.rank else 0)
    sizes = [f"{n / 1e9:.3g} B" if n >= 1e9 else f"{n / 1e6:.3g} M" for n in (own, m.trained)]
    peaks = [f"{found.memory[name].peak / GIB:.1f}" for name in SHARDINGS]
    rows = f"{work.sample:,.0f} / {work.train:,.0f} / {work.reference:,.0f}"
    cells = [f"`{recipe}`", *sizes, f"{m.forward_flops / 1e12:.3g}", *peaks, rows, f"{work.seconds:,.0f}"]
    return f"| {' | '.join(cells)} |\n"


def rehearse(
    config: RunConfig,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    tflops: float = 990.0,
    utilization: float = 0.4,
    device: Device = "cuda",
) -> tuple[dict[str, Any], Estimate]:
    """Everything about a run that can be known without weights and rewards: its plan, and what it will cost.

    device: what it runs on; in half precision another needs other memory.
    Raises ConfigError or ValueError with the setting to mend, as the run itself would.
    """
    source = PromptSource.read(config.prompts, config.training.seed)
    source.check_split(gpus)
    read_prompts(config.prompts.heldout_file or config.prompts.file)
    weights = {name: reward.schedule for name, reward in config.rewards.items()}
    composer = compose(config, weights, [prompt.text for prompt in source.prompts])
    algorithm = composed(config.algorithm.build(composer.shares), composer)
    if of_captioners(algorithm):
        raise ConfigError(
            f"algorithm.name: {config.method} trains a captioner, and plans without weights are of flow "
            "models; mmalign train --plan reads its weights"
        )
    check_noise(algorithm, config.training.seed)
    plans = algorithm.plans(0, config.training.seed)
    try:
        policy = blank_policy(config.policy, algorithm.noise, algorithm.split)
        check_kind(config, policy, algorithm)
        cost = cost_of(config, algorithm, policy)
        each = -(-config.prompts.per_iteration * config.prompts.group // max(1, gpus))
        updates = config.training.updates * (max(plan.actions for plan in plans) if algorithm.apart else 1)
        rows = math.ceil(cost["train"] / updates / max(1, gpus))  # of one update on one device
        batch = config.training.batch
        rest = rows % batch if rows > batch else 0
        pictures = 0
        if isinstance(policy.adapter, SeesPictures):
            pictures = max(len(sources_of(one.text, one.extra, False)) for one in source.prompts)
        measured = measure(policy, min(rows, batch), each, rows > batch, rest, device, pictures)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    plan = derive(config, algorithm, policy, cost, gpus, len(source.prompts))
    plan = {"latent": " x ".join(map(str, policy.shape)), **plan}
    copies = len(algorithm.copies) + (config.training.ema_decay > 0)
    found = estimate(
        config, cost, plans, copies, measured, policy.shape, gpus, gpu_memory, tflops, utilization
    )
    return plan, found
