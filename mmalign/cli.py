"""The commands of `mmalign`; the scripts are the same ones."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

OVERRIDE = re.compile(r"(policy|prompts|rewards|algorithm|composition|training|evaluation|run)[\w.:]*=")
STOPPED = 143  # as a shell says of a process that SIGTERM ended
LAB_CAPTIONS = Path("assets/lab/captions/heldout.jsonl")
Command = Callable[[argparse.Namespace], int]


class Refused(Exception):
    """Something that cannot be done as asked; the message is all a user needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0: done, 1: the run failed, 2: it could not start, 143: it was stopped and can go on."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    run: Command = options.command
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # algorithms and rewards of one's own are found from where one stands
    try:
        return run(options)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        if options.debug and refused.__cause__ is not None:
            traceback.print_exception(refused.__cause__)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Options of a command; overrides may stand anywhere among them."""
    top = parser(wants_help=any(a in ("-h", "--help") for a in given))
    overrides = [a for a in given if OVERRIDE.match(a)]
    options, rest = top.parse_known_args([a for a in given if a not in overrides])
    if rest:
        top.error(f"what does {' '.join(rest)} mean? Settings are written section.field=value")
    if overrides and not hasattr(options, "overrides"):
        top.error(f"this command has no settings, got {' '.join(overrides)}")
    options.overrides = [*getattr(options, "overrides", []), *overrides]
    return options


def early(make: Callable[[], Any]) -> Any:
    """The result of `make`, or Refused: errors before the work begins are for the user to mend."""
    from mmalign.contracts import RolloutError
    from mmalign.scoring import RewardError

    try:
        return make()
    except (ValueError, TypeError, OSError, ImportError, RewardError, RolloutError) as error:
        raise Refused(str(error) or type(error).__name__) from error


def parser(wants_help: bool = False) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "mmalign", description="Align multimodal generators by reinforcement learning."
    )
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Command, text: str, settings: bool = False) -> argparse.ArgumentParser:
        part = commands.add_parser(
            name,
            help=text.partition(".")[0],
            description=text,
            epilog=_settings_help(sys.argv) if settings and wants_help else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        part.set_defaults(command=run)
        part.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return part

    train = command(
        "train", train_command, "Train a policy. Goes on where the run's folder left off.", settings=True
    )
    train.add_argument(
        "--config", required=True, metavar="FILE", help="recipe, such as assets/recipes/quickstart.yaml"
    )
    train.add_argument(
        "--fresh", action="store_true", help="start over: remove what an earlier run left in run.dir"
    )
    train.add_argument("--plan", action="store_true", help="check everything, print the plan, and stop")
    train.add_argument(
        "--dry-run", action="store_true", help="the same without weights and rewards, and what it will cost"
    )
    add_devices(train)
    add_overrides(train)

    planned = command(
        "plan",
        plan_command,
        "What a run will cost: memory, arithmetic and time, without its weights.",
        settings=True,
    )
    planned.add_argument("--config", required=True, metavar="FILE", help="recipe, by its file or name")
    planned.add_argument("--json", metavar="FILE", help="write the numbers there")
    add_devices(planned)
    add_overrides(planned)

    sample = command(
        "sample", sample_command, "Draw labelled grids of prompts x seeds, before and after training."
    )
    add_subject(sample)
    sample.add_argument("--out", metavar="FILE", help="grid (PNG) and, beside it, gallery (HTML)")
    sample.add_argument("--only", choices=("before", "after"), help="draw one side alone")
    add_overrides(sample)

    evaluate = command("evaluate", evaluate_command, "Score a run, checkpoint, model or folder of images.")
    add_subject(evaluate)
    evaluate.add_argument("--json", metavar="FILE", help="write the scores there")
    evaluate.add_argument(
        "--baseline", metavar="FILE", help="compare, prompt by prompt, with what an earlier --json wrote"
    )
    evaluate.add_argument(
        "--reference",
        metavar="PLACE",
        help="folder or zip of pictures to measure KID, precision and recall against (evaluation.references)",
    )
    evaluate.add_argument(
        "--features",
        metavar="NAME",
        help="network that these are measured by: pixels, efficientnet, or the folder of an image model "
        "(evaluation.features)",
    )
    evaluate.add_argument(
        "--references",
        metavar="FILE",
        help="write quantiles of the base model by prompt, over its seeds, for the composition log_sigmoid",
    )
    evaluate.add_argument("--quantile", type=float, default=0.85, help="of --references (default 0.85)")
    evaluate.add_argument(
        "--compare", action="store_true", help="score the base model as well, and the gain over it"
    )
    add_overrides(evaluate)

    probed = command(
        "probe", probe_command, "What changes that should not please gain of a reward, on a folder of images."
    )
    probed.add_argument("images", help="folder of images, as for evaluate")
    probed.add_argument(
        "--rewards", nargs="+", required=True, metavar="NAME", help="as name or name={setting: value}"
    )
    probed.add_argument("--probes", nargs="+", default=[], metavar="NAME", help="these alone (default: all)")
    probed.add_argument("--strength", type=float, default=1.0, help="of each, 0 to 1 (default 1)")
    probed.add_argument("--json", metavar="FILE", help="write the numbers there")

    best = command(
        "best-of-n", best_of_n_command, "What the base model reaches by drawing more: the curve to beat."
    )
    add_subject(best)
    best.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes (default 1 2 4 8 16)")
    best.add_argument(
        "--betas", type=float, nargs="*", default=[1.0, 0.5, 0.2, 0.1, 0.05], help="of the tilted law"
    )
    best.add_argument("--out", metavar="FILE", help="write the numbers (JSON) and the plot (SVG) there")
    add_overrides(best)

    told = command("caption", caption_command, "Caption a folder of pictures, a JSON line each.")
    told.add_argument("subject", help="folder of a run of a captioner, a checkpoint, or a model")
    told.add_argument(
        "--lora", metavar="FOLDER", help="trained weights over a plain model, as a checkpoint holds them"
    )
    told.add_argument("--images", required=True, metavar="FOLDER", help="pictures, also in folders inside it")
    told.add_argument("--out", required=True, metavar="FILE", help="where lines go; goes on where it ended")
    told.add_argument("--prompt", default="Describe the picture.", metavar="TEXT", help="what is asked")
    told.add_argument("--seeds", type=int, default=1, metavar="N", help="captions a picture (default 1)")
    told.add_argument("--batch", type=int, default=32, metavar="N", help="captions at once (default 32)")
    told.add_argument(
        "--temperature", type=float, metavar="T", help="default: the policy's own; near 0: the likeliest"
    )
    add_overrides(told)

    sieve = command(
        "filter-questions",
        filter_command,
        "Keep the questions that a picture answers and nothing else does (CapRL).",
    )
    sieve.add_argument("subject", help="who is asked: a captioner's run, checkpoint or model")
    sieve.add_argument("--lora", metavar="FOLDER", help="trained weights over a plain model")
    sieve.add_argument(
        "--questions", required=True, metavar="FILE", help="prompt file with questions (.jsonl)"
    )
    sieve.add_argument("--out", required=True, metavar="FILE", help="the same file with those that are kept")
    sieve.add_argument("--seen", type=float, default=0.75, help="right more often with the picture (0.75)")
    sieve.add_argument("--blind", type=float, default=0.25, help="right less often without it (0.25)")
    sieve.add_argument("--tries", type=int, default=4, metavar="N", help="times each is asked (default 4)")
    sieve.add_argument("--batch", type=int, default=32, metavar="N", help="answers at once (default 32)")
    add_overrides(sieve)

    asked = command("judge", judge_command, "How good a judge of captions is, against labelled differences.")
    asked.add_argument("--judge", default="lab", metavar="NAME", help="who is judged (default lab)")
    asked.add_argument(
        "--settings",
        default="{}",
        metavar="YAML",
        help="of the judge: '{url: http://host/v1, model: x}'",
    )
    asked.add_argument("--cases", metavar="FILE", help="labelled cases (.jsonl); without, the lab's own")
    asked.add_argument("--count", type=int, default=200, metavar="N", help="of the lab's own (default 200)")
    asked.add_argument("--seed", type=int, default=0, metavar="N", help="of their mistakes (default 0)")
    asked.add_argument("--record", metavar="FILE", help="keep answers there, and take known ones from it")
    asked.add_argument("--replay", action="store_true", help="ask nobody: take answers from --record alone")
    asked.add_argument("--no-swap", action="store_true", help="ask once, which tells no taste for a place")
    asked.add_argument("--json", metavar="FILE", help="write the numbers there")

    made = command(
        "reproduce", reproduce_command, "Run experiments on equal budget and write the page of results."
    )
    made.add_argument("experiments", nargs="*", metavar="FILE", help="default: all of assets/experiments")
    made.add_argument("--only", nargs="+", default=[], metavar="ARM", help="run these arms alone")
    made.add_argument("--runs", default="runs/reproduce", metavar="FOLDER", help="where runs lie and go on")
    made.add_argument("--out", default="docs/results.md", metavar="FILE", help="the page; data lie beside it")
    made.add_argument("--write-only", action="store_true", help="run nothing, write what is known")

    bench = command("benchmark", benchmark_command, "Measure where the time of an iteration goes.")
    bench.add_argument("--recipe", required=True, metavar="NAME", help="name of a recipe, or its file")
    bench.add_argument("--iterations", type=int, default=4, help="iterations that are measured (default 4)")
    bench.add_argument("--warmup", type=int, default=1, help="iterations before them (default 1)")
    bench.add_argument(
        "--overlap",
        type=int,
        metavar="PARTS",
        help="a reward as long as sampling: judged at the end against judged in so many parts meanwhile",
    )
    bench.add_argument(
        "--writing",
        action="store_true",
        help="of a captioner: its sampling against generate, and its update with and without a shared prefix",
    )
    bench.add_argument(
        "--steps",
        type=counts,
        metavar="N,N,...",
        help="memory of an iteration with so many denoising steps, and what of it are states that are stored",
    )
    bench.add_argument(
        "--beside",
        metavar="RECIPE",
        help="another recipe that takes turns with the first: how many times its seconds an iteration takes",
    )
    bench.add_argument("--json", metavar="FILE", help="write the numbers there")
    add_overrides(bench)

    server = command(
        "serve-rewards", serve_command, "Serve rewards over HTTP, for the reward `remote` of other machines."
    )
    server.add_argument(
        "rewards", nargs="+", metavar="NAME", help="rewards, as name or 'name={setting: value}'"
    )
    server.add_argument(
        "--learned", type=Path, metavar="RUN", help="folder of a run that has taught the rewards that learn"
    )
    server.add_argument("--device", default="", help="where pictures are judged (default: the accelerator)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    server.add_argument("--port", type=int, default=8100, help="port to listen at (default 8100)")
    server.add_argument(
        "--token", default="", help="that requests must carry; better in MMALIGN_REWARD_TOKEN than here"
    )
    server.add_argument("--megabytes", type=float, default=256.0, help="of a request, at most (default 256)")
    server.add_argument("--outcomes", type=int, default=4096, help="of a request, at most (default 4096)")
    server.add_argument("--waiting", type=int, default=64, help="requests of a reward at once (default 64)")

    again = command("report", report_command, "Write report.json and report.html of a run's folder again.")
    again.add_argument("run", metavar="RUN", help="folder of a run")

    schema = command(
        "schema", schema_command, "Print the JSON schema of a recipe, or the settings as Markdown."
    )
    schema.add_argument("--markdown", action="store_true", help="docs/configuration.md instead of the schema")
    schema.add_argument("--out", metavar="FILE", help="write it there")
    return top


def add_devices(part: argparse.ArgumentParser) -> None:
    """What a plan without weights reckons with."""
    part.add_argument("--gpus", type=int, default=1, help="devices (default 1)")
    part.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="what they are: half precision takes other memory on each (default cuda)",
    )
    part.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each (default 80)")
    part.add_argument(
        "--gpu-tflops",
        type=float,
        default=990.0,
        metavar="N",
        help="of each, at the run's precision (default 990, an H100 in bf16)",
    )
    part.add_argument("--utilization", type=float, default=0.4, metavar="SHARE", help="of that (default 0.4)")


def counts(text: str) -> list[int]:
    """Whole numbers above 0, with commas between them."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"takes whole numbers with commas between them, got {text!r}")
    return [int(part) for part in parts]


def add_overrides(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings put over those of the file"
    )


def add_subject(part: argparse.ArgumentParser) -> None:
    part.add_argument("subject", help="folder of a run, a checkpoint, a model, or (evaluate) of images")
    part.add_argument(
        "--lora", metavar="FOLDER", help="trained weights over a plain model, as a checkpoint holds them"
    )
    part.add_argument(
        "--prompts", metavar="FILE|TEXT", help="prompt file, or one prompt (default: held-out prompts)"
    )
    part.add_argument(
        "--rewards", nargs="+", metavar="NAME", help="rewards, as name or name={setting: value}"
    )
    part.add_argument("--count", type=int, metavar="N", help="how many of the prompts, evenly from the file")
    part.add_argument("--seeds", type=int, metavar="N", help="pictures a prompt")
    part.add_argument("--steps", type=int, metavar="N", help="denoising steps")


def _settings_help(arguments: Sequence[str]) -> str:
    from mmalign.config import explain

    return "settings of a recipe, each also section.field=value:\n\n" + explain()


# Commands. Each imports what it needs, so that `--help` of the others is quick.


def train_command(options: argparse.Namespace) -> int:
    from mmalign import assembly, checkpoints
    from mmalign.config import load_config
    from mmalign.contracts import RolloutError
    from mmalign.scoring import RewardError
    from mmalign.trainer import TrainingError

    if options.dry_run:
        return plan_command(options)
    config = early(lambda: load_config(options.config, options.overrides))
    folder = Path(config.run.dir)
    going_on = None if options.fresh else checkpoints.latest(folder)
    changed = assembly.changes(folder, config) if going_on else []
    run = early(lambda: assembly.assemble(config, fresh=options.fresh, write=not options.plan))
    if run.distributed.is_main:
        said = [f"goes on from {going_on}" if going_on else f"writes into {folder}"]
        print(
            plan_text(config, run.plan, [*said, *(f"changed since: {change}" for change in changed)]),
            flush=True,
        )
    if options.plan:
        return 0
    try:
        result = run.train()
    except (RewardError, RolloutError, TrainingError, checkpoints.CheckpointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        if options.debug:
            traceback.print_exc()
        return 1
    finally:
        run.distributed.close()
    if run.trainer.iteration < config.training.iterations:
        print(
            f"\nstopped after {run.trainer.iteration} iterations; the same command goes on", file=sys.stderr
        )
        return STOPPED
    if result:
        print(result_text(result, folder))
    return 0


def plan_command(options: argparse.Namespace) -> int:
    from mmalign import planning
    from mmalign.config import load_config, recipe

    config = early(lambda: load_config(recipe(options.config), options.overrides))
    plan, found = early(
        lambda: planning.rehearse(
            config,
            options.gpus,
            options.gpu_memory,
            options.gpu_tflops,
            options.utilization,
            options.device,
        )
    )
    print(plan_text(config, plan, []), planning.page(found, options.gpu_memory, options.gpus), sep="\n\n")
    if file := getattr(options, "json", None):
        Path(file).write_text(json.dumps({"plan": plan, **found.to_dict()}, indent=1) + "\n")
    return 0


def plan_text(config: Any, plan: dict[str, Any], notes: Sequence[str]) -> str:
    """What will happen, before it does."""
    weights = ", ".join(f"{name} {weight_text(reward.schedule)}" for name, reward in config.rewards.items())
    rows = {"policy": config.policy.model, "algorithm": config.method, "rewards": weights}
    rows |= ({"composition": config.composed} if config.composed else {}) | plan
    width = max(map(len, rows))
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), *notes])


def weight_text(schedule: Mapping[int, float]) -> str:
    """A weight, or its values and when they are reached."""
    if len(schedule) == 1:
        return f"{next(iter(schedule.values())):g}"
    return " to ".join(f"{weight:g} (at {iteration})" for iteration, weight in sorted(schedule.items()))


def result_text(result: dict[str, Any], folder: Path) -> str:
    from mmalign.report import between, duration, short, signed

    lines = [""]
    for name, entry in result["heldout"].items():
        if entry.get("gain") is not None:
            low, high = entry["gain_interval"]
            gain = f"{signed(entry['gain'])} {between(low, high, True)}"
            lines.append(f"held-out {name:<24} {short(entry['base'])} -> {short(entry['trained'])}   {gain}")
    diversity = result["diversity"]
    if diversity.get("ratio") is not None:
        lines.append(f"diversity {'':<23} {short(diversity['base'])} -> {short(diversity['trained'])}")
    lines.append(
        f"{result['iterations']} iterations in {duration(result['seconds']['total'])}; {folder}/report.html"
    )
    return "\n".join(lines)


def sample_command(options: argparse.Namespace) -> int:
    from mmalign import grids, subjects

    subject = early(
        lambda: subjects.open_subject(options.subject, options.overrides, options.rewards, options.lora)
    )
    shown = early(lambda: subjects.draw_all(subject, options))
    out = Path(options.out) if options.out else subject.place / "grid.png"
    title = f"{subject.name}: before and after" if len(shown) > 1 else subject.name
    first = next(iter(shown.values()))
    panels = [*first.before(), *(s.panel(side if len(shown) > 1 else "") for side, s in shown.items())]
    written = early(lambda: grids.write(out, first.prompts, panels, title))
    print("\n".join(map(str, written)))
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    from mmalign import subjects

    baseline = early(lambda: options.baseline and subjects.read_baseline(Path(options.baseline)))
    found = early(lambda: subjects.evaluate_all(options.subject, options))
    if baseline:
        early(lambda: subjects.against(baseline, subjects.subject_of(found)))
        found[subjects.BASELINE] = baseline
    subjects.print_table(found)
    if options.json:
        early(
            lambda: Path(options.json).write_text(
                json.dumps(subjects.as_json(options.subject, found), indent=2) + "\n"
            )
        )
    return 0


def probe_command(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mmalign import subjects

    def look() -> Any:
        rewards = subjects.make_single(subjects.named_rewards(options.rewards) or {})
        return subjects.probe_images(Path(options.images), rewards, options.probes, options.strength)

    found = early(look)
    subjects.print_probes(found)
    if options.json:
        rows = [asdict(one) | {"suspicious": one.suspicious} for one in found]
        early(lambda: Path(options.json).write_text(json.dumps(rows, indent=2) + "\n"))
    return 0


def best_of_n_command(options: argparse.Namespace) -> int:
    from mmalign import best_of_n

    found = early(lambda: best_of_n.measure(options))
    best_of_n.print_table(found)
    if options.out:
        print("\n".join(str(path) for path in early(lambda: best_of_n.write(found, Path(options.out)))))
    return 0


def caption_command(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmalign import captioning
    from mmalign.subjects import open_subject

    def write() -> int:
        images = captioning.pictures_in(Path(options.images))
        subject = open_subject(options.subject, options.overrides, lora=options.lora)
        return captioning.caption(
            subject,
            images,
            Path(options.out),
            options.prompt,
            options.seeds,
            options.batch,
            options.temperature,
            lambda parts, count: iter(tqdm(parts, total=count, unit="batch", disable=None)),
        )

    print(f"{early(write)} captions written to {options.out}")
    return 0


def filter_command(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mmalign import question_filter
    from mmalign.pipelines.captioner import CaptionPolicy
    from mmalign.subjects import open_policy, open_subject

    def sift() -> tuple[int, int]:
        settings = question_filter.Filter(options.seen, options.blind, options.tries)
        question_filter.read_rows(
            Path(options.questions)
        )  # what is wrong with it is said before a model is read
        subject = open_subject(options.subject, options.overrides, lora=options.lora)
        policy = open_policy(subject)
        if not isinstance(policy, CaptionPolicy):
            raise ValueError(f"{subject.policy.model} draws pictures; questions take a captioner")
        if subject.trained is not None:
            policy.load(subject.trained)
        return question_filter.run(
            policy,
            Path(options.questions),
            Path(options.out),
            settings,
            batch=options.batch,
            progress=lambda parts, count: iter(tqdm(parts, total=count, unit="batch", disable=None)),
        )

    some, whole = early(sift)
    print(f"{some} of {whole} questions kept, written to {options.out}")
    return 0


def judge_command(options: argparse.Namespace) -> int:
    import yaml

    from mmalign import judging
    from mmalign.rewardmodels.claimdiff import judge_of
    from mmalign.rewardmodels.lab_judge import labelled

    def ready() -> tuple[Any, Any]:
        settings = yaml.safe_load(options.settings) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"--settings: expected a mapping as '{{model: x}}', got {options.settings!r}")
        judge = judge_of(options.judge, settings, options.record, options.replay)
        if options.cases:
            return judge, judging.read_labels(Path(options.cases))
        return judge, labelled(LAB_CAPTIONS, options.count, options.seed)

    judge, labels = early(ready)
    found = judging.evaluate(judge, labels, swap=not options.no_swap)
    print(judging.table(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def reproduce_command(options: argparse.Namespace) -> int:
    from mmalign import experiments, results

    paths = [Path(name) for name in options.experiments] or sorted(Path("assets/experiments").glob("*.yaml"))
    asked = early(lambda: [experiments.read_experiment(path) for path in paths])
    runs, failed = Path(options.runs), 0
    for experiment in asked:
        if not options.write_only:
            failed += early(partial(experiments.run, experiment, runs, options.only))
        found = early(partial(results.collect, experiment, runs))
        print("\n".join(str(path) for path in results.write([found], Path(options.out))), flush=True)
    return 1 if failed else 0


def benchmark_command(options: argparse.Namespace) -> int:
    from mmalign import benchmark
    from mmalign.config import load_config, recipe

    config = early(lambda: load_config(recipe(options.recipe), options.overrides))
    if options.overlap is not None:
        if options.overlap < 2:
            raise Refused(f"--overlap takes 2 or more parts, got {options.overlap}")
        result = early(
            lambda: benchmark.measure_overlap(config, options.overlap, options.iterations, options.warmup)
        )
        benchmark.print_overlap(result)
    elif options.beside is not None:
        other = early(lambda: load_config(recipe(options.beside), options.overrides))
        result = early(lambda: benchmark.measure_beside(config, other, options.iterations, options.warmup))
        benchmark.print_beside(result)
    elif options.steps is not None:
        result = early(lambda: benchmark.measure_steps(config, options.steps))
        benchmark.print_steps(result)
    elif options.writing:
        result = early(lambda: benchmark.measure_writing(config, options.iterations, options.warmup))
        benchmark.print_writing(result)
    else:
        result = early(lambda: benchmark.measure(config, options.iterations, options.warmup))
        benchmark.print_table(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    else:
        print(json.dumps(result))
    return 0


def report_command(options: argparse.Namespace) -> int:
    from mmalign import report

    early(lambda: report.write(Path(options.run)))
    print(Path(options.run) / "report.html")
    return 0


def serve_command(options: argparse.Namespace) -> int:
    from mmalign import serving, subjects

    def ready() -> tuple[Any, serving.ServingSettings]:
        token = options.token or os.environ.get("MMALIGN_REWARD_TOKEN", "")
        settings = serving.ServingSettings(
            token, options.megabytes, options.outcomes, options.waiting, device=options.device
        )
        given = subjects.named_rewards(options.rewards) or {}
        rewards = [serving.freeze(reward, options.learned) for reward in subjects.make(given)]
        made = [(reward, one.settings) for reward, one in zip(rewards, given.values(), strict=True)]
        return serving.application(made, settings), settings

    app, settings = early(ready)
    guarded = "with a token" if settings.token else "without a token"
    print(
        f"serving {', '.join(options.rewards)} at http://{options.host}:{options.port}, {guarded}", flush=True
    )
    serving.serve(app, options.host, options.port)
    return 0


def schema_command(options: argparse.Namespace) -> int:
    from mmalign import config

    text = config.markdown() if options.markdown else json.dumps(config.json_schema(), indent=1) + "\n"
    if options.out:
        early(lambda: Path(options.out).write_text(text, encoding="utf-8"))
    else:
        print(text, end="")
    return 0
