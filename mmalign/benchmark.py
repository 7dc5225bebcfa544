"""Where the time of an iteration goes: timers around everything that is not ours, and the rest is ours."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.assembly import Run, assemble, device_name
from mmalign.config import RunConfig
from mmalign.contracts import LearnedReward, RewardModel, judges_alone
from mmalign.health import Clock
from mmalign.pipelines.captioner import CaptionPolicy
from mmalign.planning import Live
from mmalign.records import Outcome, Plan, RewardSignal

MODEL = ("network forward", "network backward", "text encoders", "VAE", "reward")
TARGET = 0.05  # share of an iteration that may go elsewhere


class Stopwatch:
    """Seconds by name; a timer inside another one takes its time from it, so that all add up to the whole."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[list[Any]] = []  # [name, began, seconds of inner timers]

    def start(self, name: str) -> None:
        self._wait()
        self._open.append([name, perf_counter(), 0.0])

    def stop(self) -> None:
        self._wait()
        name, began, inner = self._open.pop()
        spent = perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner
        if self._open:
            self._open[-1][2] += spent

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return call(*args, **kwargs)

        return timed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TimedReward:
    """A reward under a stopwatch."""

    def __init__(self, reward: RewardModel, watch: Stopwatch) -> None:
        self.name, self._reward, self._watch = reward.name, reward, watch

    def __call__(self, outcome: Outcome) -> RewardSignal:
        with self._watch("reward"):
            return self._reward(outcome)


class Delayed:
    """A reward that takes as long as sampling does, most of it waiting, as for a server.

    pace: seconds a sample. None: all samples are drawn before it is asked, and the clock tells how long that
    took.
    """

    def __init__(self, reward: RewardModel, clock: Clock) -> None:
        self.name, self._reward, self._clock = reward.name, reward, clock
        self.pace: float | None = None
        self.judged = 0  # samples

    def __call__(self, outcome: Outcome) -> RewardSignal:
        began, spent = perf_counter(), self._clock.seconds
        # Under several plans it is asked after each: earlier ones have been waited for.
        due = spent["sample"] - spent.get("reward", 0.0)
        if self.pace is not None:
            due = self.pace * len(outcome.prompts)
        signal = self._reward(outcome)
        self.judged += len(outcome.prompts)
        sleep(max(0.0, due - (perf_counter() - began)))
        return signal


def instrument(run: Run, watch: Stopwatch) -> None:
    """Put timers around the network, its backward, VAE, text encoders, rewards and the optimizer."""
    policy, trainer = run.policy, run.trainer
    watch_module(run.distributed.unwrap(policy.module), "network forward", watch)
    if not isinstance(policy, CaptionPolicy):
        adapter = policy.adapter
        for name, part in adapter.pipeline.components.items():
            if isinstance(part, nn.Module) and name.startswith("text_encoder"):
                watch_module(part, "text encoders", watch)
        adapter.decode = watch.wrap("VAE", adapter.decode)  # type: ignore[method-assign]
    run.distributed.backward = watch.wrap("network backward", run.distributed.backward)  # type: ignore[method-assign]
    optimizer = trainer.learner.optimizer
    optimizer.step = watch.wrap("optimizer", optimizer.step)  # type: ignore[method-assign]
    if trainer.settings.overlap > 1:
        return  # rewards work beside the network; what they cost is what is waited for
    trainer.scorer.rewards = [
        TimedReward(reward, watch)
        if judges_alone(reward) and not isinstance(reward, LearnedReward)
        else reward
        for reward in trainer.scorer.rewards
    ]


def watch_module(module: nn.Module, name: str, watch: Stopwatch) -> None:
    module.register_forward_pre_hook(lambda *_: watch.start(name))
    module.register_forward_hook(lambda *_: watch.stop())


def measure(config: RunConfig, iterations: int = 4, warmup: int = 1) -> dict[str, Any]:
    """Mean seconds of an iteration by where they went, forwards, memory; writes no file."""
    training = replace(config.training, iterations=warmup + iterations, save_every=0, noise_floor="warn")
    run = assemble(replace(config, training=training), write=False)
    trainer = run.trainer
    watch = Stopwatch(run.distributed.device)
    instrument(run, watch)
    before = forwards_of(run)
    for iteration in range(warmup + iterations):
        if iteration == warmup:
            watch.seconds.clear()
            trainer.clock.lap()
            before, began = forwards_of(run), perf_counter()
        metrics = trainer.step(iteration)
    whole = (perf_counter() - began) / iterations
    parts = {name: seconds / iterations for name, seconds in watch.seconds.items()}
    phases = {name: seconds / iterations for name, seconds in trainer.clock.lap().items()}
    if trainer.settings.overlap > 1:
        parts["reward"] = phases.get("reward", 0.0)
    inside = sum(parts.get(name, 0.0) for name in MODEL)
    rest = whole - sum(parts.values())
    counts = {name: (count - before[name]) / iterations for name, count in forwards_of(run).items()}
    run.distributed.close()
    return {
        "recipe": config.run.dir.rpartition("/")[2],
        "device": device_name(run.distributed.device),
        "threads": torch.get_num_threads(),
        "iterations": iterations,
        "samples": config.prompts.per_iteration * config.prompts.group,
        "seconds_per_iteration": whole,
        "seconds": {**parts, "everything else": rest},
        "outside": whole - inside,
        "outside_share": (whole - inside) / whole,
        "phases": phases,
        "forwards": counts,
        "peak_memory_bytes": int(metrics["memory/peak_bytes"]),
        "plan": run.plan,
    }


def measure_beside(
    config: RunConfig, other: RunConfig, iterations: int = 4, warmup: int = 1
) -> dict[str, Any]:
    """Seconds of an iteration of two recipes, and how many times the first takes those of the second.

    They take turns, so that a machine that is busy with other things now and then slows down both. What does
    not happen in every iteration, as MARBLE's looks, is counted rightly where `iterations` is a multiple of
    its period. Writes no file.
    """
    pair = []
    for one in (config, other):
        training = replace(one.training, iterations=warmup + iterations, save_every=0, noise_floor="warn")
        pair.append(assemble(replace(one, training=training), write=False))
    laps: list[list[dict[str, float]]] = [[], []]
    for iteration in range(warmup + iterations):
        for run, own in zip(pair, laps, strict=True):
            run.trainer.clock.lap()
            run.trainer.step(iteration)
            own.append(run.trainer.clock.lap())
    for run in pair:
        run.distributed.close()
    first, second = (own[warmup:] for own in laps)
    phases = [
        {name: sum(lap.get(name, 0.0) for lap in own) / iterations for name in dict.fromkeys(chain(*own))}
        for own in (first, second)
    ]
    return {
        "recipe": config.run.dir.rpartition("/")[2],
        "beside": other.run.dir.rpartition("/")[2],
        "device": device_name(pair[0].distributed.device),
        "threads": torch.get_num_threads(),
        "iterations": iterations,
        "samples": [one.prompts.per_iteration * one.prompts.group for one in (config, other)],
        "phases": phases,
        "ratio": phases[0]["iteration"] / phases[1]["iteration"],
        "update_ratio": phases[0]["update"] / phases[1]["update"],
    }


def measure_overlap(config: RunConfig, parts: int, iterations: int = 4, warmup: int = 1) -> dict[str, Any]:
    """An iteration whose reward takes as long as sampling: judged at the end, and while more is drawn.

    Both ways take turns in one run, after `warmup` turns, and the reward's pace is that of the sampling of
    the same turn: a machine that is busy with other things now and then slows down all three. Writes no file.
    """
    training = replace(config.training, iterations=10**6, save_every=0, noise_floor="warn", overlap=1)
    run = assemble(replace(config, training=training), write=False)
    trainer, samples = run.trainer, config.prompts.per_iteration * config.prompts.group
    first, *others = (reward for reward in trainer.scorer.rewards if judges_alone(reward))
    delayed = Delayed(first, trainer.clock)
    trainer.scorer.rewards = [delayed, *others]

    def lap(iteration: int, overlap: int) -> dict[str, float]:
        trainer.settings = replace(training, overlap=overlap)
        trainer.clock.lap()
        trainer.step(iteration)
        return trainer.clock.lap()

    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    for iteration in range(warmup + iterations):
        delayed.pace, delayed.judged = None, 0
        blocking = lap(iteration, 1)
        delayed.pace = blocking["sample"] / delayed.judged
        turns.append((blocking, lap(iteration, parts)))
    run.distributed.close()
    turns = turns[warmup:]
    blocking, overlapped = (
        {name: sum(one[name] for one in way) / iterations for name in way[0]}
        for way in zip(*turns, strict=True)
    )
    return {
        "recipe": config.run.dir.rpartition("/")[2],
        "device": device_name(run.distributed.device),
        "parts": parts,
        "iterations": iterations,
        "samples": samples,
        "blocking": blocking,
        "overlapped": overlapped,
        "share": overlapped["iteration"] / blocking["iteration"],
        "shares": [own["iteration"] / whole["iteration"] for whole, own in turns],
    }


def measure_writing(config: RunConfig, iterations: int = 4, warmup: int = 1) -> dict[str, Any]:
    """Sampling against transformers' `generate` at the same batch, and updates with prefixes shared or not.

    All ways take turns in one run; every text has `policy.text.max_tokens` tokens, so that lengths are equal.
    """
    training = replace(config.training, save_every=0, noise_floor="warn")
    run = assemble(replace(config, training=training), write=False)
    policy = run.policy
    if not isinstance(policy, CaptionPolicy):
        raise ValueError(f"--writing takes a captioner; {config.policy.model} draws pictures")
    policy.adapter.ends = []
    policy._ends = policy._ends[:0]
    prompts, size = run.trainer.prompts.at(0), config.prompts.group
    count, longest = len(prompts), config.policy.text.max_tokens
    policy.chunk = count
    firsts = [policy._inputs(prompts.text[i], str(prompts.extra[i]["image"])) for i in range(0, count, size)]
    if len({one["input_ids"].shape for one in firsts}) > 1:
        raise ValueError("--writing needs prompts and pictures of equal length; name a file with one prompt")
    batch = {name: torch.cat([one[name] for one in firsts]) for name in firsts[0]}
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        began = perf_counter()
        call()
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - began

    def generate() -> None:
        with torch.no_grad():
            run.distributed.unwrap(policy.module).generate(  # type: ignore[operator]
                **batch,
                do_sample=True,
                top_k=0,
                num_return_sequences=size,
                min_new_tokens=longest,
                max_new_tokens=longest,
            )

    def update(shared: bool) -> None:
        policy.text = replace(policy.text, share_prefix=shared)
        for pick in policy.picks(trajectory, torch.arange(count), config.training.batch):
            policy.evaluate(trajectory, pick).log_prob.sum().backward()  # type: ignore[no-untyped-call]
        policy.module.zero_grad(set_to_none=True)
        policy.text = config.policy.text

    for round_ in range(warmup + iterations):
        if round_ == warmup:
            seconds.clear()
        key = (config.training.seed, "benchmark", round_)
        timed("sample", lambda key=key: policy.sample(prompts, Plan(1), key))  # type: ignore[misc]
        timed("generate", generate)
        trajectory = policy.sample(prompts, Plan(1), key)
        timed("update", lambda: update(True))
        timed("update apart", lambda: update(False))
    run.distributed.close()
    each = {name: spent / iterations for name, spent in seconds.items()}
    tokens = count * longest
    return {
        "recipe": config.run.dir.rpartition("/")[2],
        "device": device_name(run.distributed.device),
        "texts": count,
        "group": size,
        "prompt_tokens": int(firsts[0]["input_ids"].shape[1]),
        "tokens": longest,
        "seconds": each,
        "tokens_per_second": {name: tokens / each[name] for name in ("sample", "generate")},
        "sampling_gain": each["generate"] / each["sample"],
        "sharing_gain": each["update apart"] / each["update"],
    }


def measure_steps(config: RunConfig, counts: Sequence[int]) -> dict[str, Any]:
    """What a second iteration needs beside what was there before it, for numbers of denoising steps.

    stored: bytes of the states that are kept for the update. rest: the peak less those. decoded: the most
    latents that were decoded at once. On a CPU the bytes of live tensors are counted, without what a single
    operation needs inside; elsewhere it is what the allocator says. Writes no file.
    """
    if not hasattr(config.algorithm, "steps"):
        raise ValueError(f"--steps: the method {config.method} has no setting algorithm.steps")
    training = replace(config.training, iterations=2, save_every=0, noise_floor="warn")
    rows = []
    for steps in counts:
        algorithm = replace(config.algorithm, steps=steps)  # type: ignore[type-var]
        run = assemble(replace(config, training=training, algorithm=algorithm), write=False)
        if isinstance(run.policy, CaptionPolicy):
            raise ValueError(f"--steps takes a model that draws; {config.policy.model} writes")
        rows.append({"steps": steps, **_bytes_of_an_iteration(run)})
        device = device_name(run.distributed.device)
        run.distributed.close()
    rest = [row["rest"] for row in rows]
    return {
        "recipe": config.run.dir.rpartition("/")[2],
        "device": device,
        "samples": config.prompts.per_iteration * config.prompts.group,
        "steps": rows,
        "growth": max(rest) / min(rest),
    }


def _bytes_of_an_iteration(run: Run) -> dict[str, int]:
    policy, trainer, device = run.policy, run.trainer, run.distributed.device
    assert not isinstance(policy, CaptionPolicy)
    draw, decode, stored, decoded = policy.sample, policy.adapter.decode, 0, 0

    def sample(*args: Any) -> Any:
        nonlocal stored
        trajectory = draw(*args)
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in trajectory.replay.values()}
        stored = sum(storage.nbytes() for storage in kept.values())
        return trajectory

    def decoding(latents: Tensor) -> Tensor:
        nonlocal decoded
        decoded = max(decoded, len(latents))
        media: Tensor = decode(latents)
        return media

    policy.sample, policy.adapter.decode = sample, decoding  # type: ignore[method-assign]
    trainer.step(0)  # the optimizer's moments, texts
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        trainer.step(1)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with Live(part for part in gc.get_objects() if issubclass(type(part), Tensor)) as live:
            trainer.step(1)
        peak = live.peak
    return {"peak": peak, "stored": stored, "rest": peak - stored, "decoded": decoded}


def print_steps(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"one iteration of {result['recipe']}, {result['samples']} samples, {result['device']}"
    table = Table("steps", "peak", "stored states", "rest", "decoded at once", title=title)
    for column in table.columns:
        column.justify = "right"
    for row in result["steps"]:
        megabytes = [f"{row[name] / 1e6:.1f} MB" for name in ("peak", "stored", "rest")]
        table.add_row(str(row["steps"]), *megabytes, str(row["decoded"]))
    table.caption = f"the rest differs by a factor of {result['growth']:.3f}"
    Console().print(table)


def print_writing(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{result['texts']} texts of {result['tokens']} tokens after {result['prompt_tokens']}, groups of "
        f"{result['group']}, {result['device']}"
    )
    table = Table("what", "seconds", "tokens a second", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, spent in result["seconds"].items():
        rate = result["texts"] * result["tokens"] / spent
        table.add_row(name, f"{spent:.3f}", f"{rate:.0f}")
    Console().print(table)
    print(
        f"sampling is {result['sampling_gain']:.2f} x as fast as generate; a shared prefix makes the update "
        f"{result['sharing_gain']:.2f} x as fast"
    )


def print_beside(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    first, second = result["phases"]
    table = Table(
        "phase",
        result["recipe"],
        result["beside"],
        title=f"one iteration, the mean of {result['iterations']} in turns, {result['device']}",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in first.items():
        table.add_row(name, f"{seconds:.3f} s", f"{second.get(name, 0.0):.3f} s")
    table.caption = f"an iteration takes {result['ratio']:.3f} x, its update {result['update_ratio']:.3f} x"
    Console().print(table)


def print_overlap(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"one iteration of {result['recipe']}, its reward as long as sampling, {result['device']}"
    table = Table("phase", "blocking", f"in {result['parts']} parts", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in result["blocking"].items():
        table.add_row(name, f"{seconds:.3f} s", f"{result['overlapped'].get(name, 0.0):.3f} s")
    least, most = min(result["shares"]), max(result["shares"])
    table.caption = (
        f"{result['share']:.3f} of the blocking iteration; {least:.3f} to {most:.3f} in single turns"
    )
    Console().print(table)


def forwards_of(run: Run) -> dict[str, int]:
    counts = run.policy.forwards
    return {"sample": counts.sample, "train": counts.train, "reference": counts.reference}


def print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    whole, console = result["seconds_per_iteration"], Console()
    table = Table(
        "where", "seconds", "share", title=f"one iteration of {result['recipe']}, {result['device']}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in sorted(result["seconds"].items(), key=lambda part: -part[1]):
        table.add_row(name, f"{seconds:.3f}", f"{seconds / whole:.1%}")
    table.add_section()
    table.add_row("iteration", f"{whole:.3f}", "100.0%")
    share = result["outside_share"]
    verdict = "within" if share <= TARGET else "above"
    table.add_row("outside model, VAE, reward", f"{result['outside']:.3f}", f"{share:.1%}")
    table.caption = f"{verdict} the target of {TARGET:.0%} outside"
    console.print(table)
    phases = Table("phase", "seconds", "share")
    for name, seconds in sorted(result["phases"].items(), key=lambda part: -part[1]):
        if name != "iteration":
            phases.add_row(name, f"{seconds:.3f}", f"{seconds / whole:.1%}")
    console.print(phases)
    counts = ", ".join(f"{count:.0f} {name}" for name, count in result["forwards"].items())
    console.print(
        f"forwards an iteration: {counts}; peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
