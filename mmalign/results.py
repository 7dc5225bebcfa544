"""What experiments found: from the folders of their runs to docs/results/*.json, and from these to a page.

Every number of the page comes from a run; nothing on it is typed. The JSON files are kept with the page, so
that an experiment can be run again without the others.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import comparison, report
from mmalign.charts import Line, figure
from mmalign.comparison import Estimate, Measured
from mmalign.config import plain
from mmalign.evaluation import Evaluated, no_nan
from mmalign.experiments import KL, NOTHING, Comparison, Experiment, extra, folder_of, spent
from mmalign.report import BASE, TRAINED

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """A finished run, read back."""

    files: report.RunFiles
    summary: Found  # report.json

    @classmethod
    def read(cls, folder: Path) -> Finished | None:
        """The run in a folder, or None where it is not finished."""
        told = folder / "report.json"
        if not told.is_file():
            return None
        return cls(report.RunFiles.read(folder), json.loads(told.read_text(encoding="utf-8")))

    @property
    def spent(self) -> list[tuple[int, float, float]]:
        """(iterations, forwards, seconds of training) after each iteration, and before the first."""
        seconds, found = 0.0, [(0, 0.0, 0.0)]
        for row in self.files.rows:
            seconds += row["seconds/iteration"] - row.get("seconds/evaluate", 0.0)
            counts = {name: row[f"forwards/{name}"] for name in ("sample", "train", "reference")}
            found.append((row["step"] + 1, spent(counts), seconds))
        return found

    @property
    def points(self) -> list[tuple[int, Evaluated]]:
        """The held-out evaluations, by iterations."""
        place = self.files.folder / report.EVALUATION
        along = [(int(path.stem[5:]), Evaluated.load(path)) for path in sorted(place.glob("step_*.json"))]
        ends = self.files.evaluated
        return [(0, ends[BASE]), *along, (len(self.files.rows), ends[TRAINED])]

    def evaluated(self, side: str, name: str) -> Evaluated:
        """One of the extra evaluations."""
        return Evaluated.load(self.files.folder / report.EVALUATION / extra(side, name))


# Numbers of an arm


def heldout(runs: Sequence[Finished], score: str) -> Measured:
    """A held-out score of every prompt along the runs."""
    values = [torch.tensor([of(e, score) for _, e in run.points], dtype=torch.float64) for run in runs]
    steps = [step for step, _ in runs[0].points]
    return Measured(torch.stack(values), *budgets(runs, steps))


def of(evaluated: Evaluated, score: str) -> list[float]:
    """A score of every prompt; `diversity` is one number for all of them."""
    if score == "diversity":
        return [math.nan if evaluated.diversity is None else evaluated.diversity]
    if score not in evaluated.by_prompt:
        raise ValueError(f"there is no held-out score {score!r}; there are {', '.join(evaluated.by_prompt)}")
    return list(evaluated.by_prompt[score])


def budgets(runs: Sequence[Finished], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Forwards and seconds after so many iterations, means over the runs."""
    spent = torch.tensor([[run.spent[step][1:] for step in steps] for run in runs], dtype=torch.float64)
    forwards, seconds = spent.mean(0).unbind(1)
    return forwards, seconds


def once(runs: Sequence[Finished], value: Callable[[Finished], float]) -> Measured:
    """One number a run."""
    values = torch.tensor([value(run) for run in runs], dtype=torch.float64)
    return Measured(values[:, None, None], *budgets(runs, [len(runs[0].files.rows)]))


def in_report(run: Finished, path: str) -> float:
    """A number of report.json by its dotted path."""
    here: Any = run.summary
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            raise ValueError(f"{run.files.folder}/report.json has no number {path!r} (at {part!r})")
        here = here[part]
    return math.nan if here is None else float(here)


def in_metrics(run: Finished, name: str) -> float:
    """The mean of the last tenth of a training metric."""
    return report.ends(column(run, name))["last"]


def column(run: Finished, name: str) -> list[float]:
    """A training metric over the iterations that have it."""
    found = run.files.column(name)
    if not found:
        raise ValueError(f"{run.files.folder}: the run has no metric {name!r}")
    return found


def divergence(run: Finished) -> float:
    """From the base model, as it was measured after the run."""
    path = run.files.folder / report.EVALUATION / KL
    return float(json.loads(path.read_text())["kl"]) if path.is_file() else math.nan


def measured(runs: Sequence[Finished], metric: str) -> Measured:
    """The numbers that a path speaks of (`Comparison.metric`)."""
    kind, _, name = metric.partition("/")
    kind, _, evaluation = kind.partition("@")
    if evaluation:
        values = [[of(run.evaluated(TRAINED, evaluation), name)] for run in runs]
        ends = budgets(runs, [len(runs[0].files.rows)])
        return Measured(torch.tensor(values, dtype=torch.float64), *ends)
    if kind in ("heldout", "forwards_to", "seconds_to"):
        return heldout(runs, name)
    if kind == "report":
        return once(runs, lambda run: in_report(run, name))
    if kind == "metrics":
        return once(runs, lambda run: in_metrics(run, name))
    if kind == "least":
        return once(runs, lambda run: min(column(run, name)))
    return once(runs, divergence)


def beginning(runs: Sequence[Finished], metric: str) -> Measured:
    """What the arm began with; the same for all of its runs."""
    kind, _, name = metric.partition("/")
    evaluation = kind.partition("@")[2]
    base = runs[0].evaluated(BASE, evaluation) if evaluation else runs[0].files.evaluated[BASE]
    return Measured(torch.tensor([[of(base, name)]], dtype=torch.float64), torch.zeros(1), torch.zeros(1))


# Claims


def compare(one: Comparison, runs: Mapping[str, Sequence[Finished]]) -> Estimate:
    """The number that a comparison is about."""
    arm, names = measured(runs[one.arm], one.metric), (one.arm, one.than)
    if one.than == NOTHING:
        itself = comparison.curves(arm.last, one.arm)[:, -1]
        return Estimate.of(-itself if one.lower else itself)
    than = beginning(runs[one.arm], one.metric) if one.than == BASE else measured(runs[one.than], one.metric)
    if one.metric.startswith(("forwards_to/", "seconds_to/")):
        found = comparison.speedup(arm, than, names, seconds=one.metric.startswith("seconds_to/"))
    else:
        found = comparison.difference(arm, than, names, seconds=one.at == "seconds")
    return Estimate.of(-found if one.lower else found)


def judged(experiment: Experiment, runs: Mapping[str, Sequence[Finished]]) -> list[dict[str, Any]]:
    """Every claim with its numbers; shown is None where runs are missing."""
    table = []
    for claim in experiment.claims:
        parts: list[dict[str, Any]] = []
        for one in claim.holds:
            known = all(runs.get(arm) for arm in (one.arm, one.than) if arm not in (BASE, NOTHING))
            found = compare(one, runs) if known else Estimate(math.nan, math.nan, math.nan)
            parts.append({"what": said(one), "by": one.by, "known": known, **asdict(found)})
        shown = all(part["low"] > part["by"] for part in parts) if all(p["known"] for p in parts) else None
        table.append({"text": claim.text, "source": claim.source, "shown": shown, "parts": parts})
    return table


def said(one: Comparison) -> str:
    """A comparison in words."""
    kind, _, name = one.metric.partition("/")
    if kind in ("forwards_to", "seconds_to"):
        return f"{kind.removesuffix('_to')} that {one.than} spent, over those {one.arm} needs for its {name}"
    if one.than == NOTHING:
        return f"{'minus ' if one.lower else ''}{one.metric} of {one.arm}"
    way = "lower by" if one.lower else "higher by"
    when = ", at equal seconds" if one.at == "seconds" else ""
    return f"{one.metric} of {one.arm}, {way}, than of {one.than}{when}"


# Collecting


def collect(experiment: Experiment, runs: Path) -> dict[str, Any]:
    """All that the page says of an experiment, from the folders of its finished runs."""
    found: dict[str, list[Finished]] = {}
    missing = []
    for name in experiment.arms:
        for seed in experiment.seeds:
            run = Finished.read(folder_of(runs, experiment, name, seed))
            if run is None:
                missing.append(f"{name}, seed {seed}")
            else:
                found.setdefault(name, []).append(run)
    facts = [run.files.facts for arm in found.values() for run in arm]
    result = {
        "experiment": plain(experiment),
        "made": {
            "date": datetime.now(UTC).date().isoformat(),
            "commits": sorted({str(fact.get("commit") or "unknown") for fact in facts}),
            "machines": sorted({f"{fact['device']} ({processor()})" for fact in facts}),
            "versions": facts[0]["versions"] if facts else {},
        },
        "missing": missing,
        "arms": {name: about(experiment, name, arm) for name, arm in found.items()},
        "claims": judged(experiment, found),
    }
    fixed: dict[str, Any] = no_nan(result)
    return fixed


def about(experiment: Experiment, name: str, runs: Sequence[Finished]) -> dict[str, Any]:
    """The numbers of one arm."""
    forwards, seconds = budgets(runs, [len(runs[0].files.rows)])
    scores, along = {}, {}
    for score in (*experiment.scores, "diversity"):
        curve = heldout(runs, score)
        drawn = comparison.curves(curve, name)
        gain = comparison.difference(curve.last, beginning(runs, f"heldout/{score}"), (name, BASE))
        scores[score] = {
            "base": float(drawn[0, 0]),
            "trained": asdict(Estimate.of(drawn[:, -1])),
            "gain": asdict(Estimate.of(gain)),
        }
        along[score] = {
            "forwards": curve.forwards.tolist(),
            "seconds": curve.seconds.tolist(),
            **{side: [getattr(Estimate.of(point), side) for point in drawn.T] for side in LIMITS},
        }
    return {
        "runs": len(runs),
        "iterations": len(runs[0].files.rows),
        "forwards": float(forwards),
        "seconds": float(seconds),
        "scores": scores,
        "kl": asdict(Estimate.of(comparison.curves(once(runs, divergence), name)[:, 0])),
        "along": along,
    }


LIMITS = ("value", "low", "high")


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


# The page


def write(found: Sequence[Mapping[str, Any]], page: Path) -> list[Path]:
    """Put results beside the page as JSON and plots, and write the page from all that lie there.

    A result without a finished run changes nothing: what is known of its experiment stays.
    """
    data, images = page.parent / page.stem, page.parent / "images"
    for folder in (data, images):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for result in [result for result in found if result["arms"]]:
        path = data / f"{result['experiment']['name']}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path)
        for name, svg in plots(result).items():
            (images / name).write_text(svg, encoding="utf-8")
            written.append(images / name)
    known = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(data.glob("*.json"))]
    page.write_text(markdown(known), encoding="utf-8")
    return [*written, page]


HEAD = """
# Results

Made by `python scripts/reproduce.py` from the runs of the experiments in `assets/experiments/`; nothing on
this page is typed. Numbers are means over runs (seeds of training) and held-out prompts; intervals are 95 %
percentile bootstraps that draw both anew; of an arm with a single run they tell of prompts alone, not of what
other seeds would give. A claim is *shown* if the whole interval of each of its comparisons lies above the
value given. Forwards are those of training, sample + 3 train + reference (a backward counts two); seconds are
those of training on the machine named, with whatever else ran there. KL is that of the path of Flow-SDE from
the base model, in nats. How experiments are run: [experiments.md](experiments.md).
"""


def markdown(results: Sequence[Found]) -> str:
    """The page."""
    parts = [HEAD.strip()]
    for result in results:
        parts += ["", *section(result)]
    return "\n".join(parts) + "\n"


def section(result: Found) -> list[str]:
    """What the page says of one experiment."""
    experiment, made = result["experiment"], result["made"]
    budget = experiment["budget"]
    limit = "the iterations of its recipe"
    if budget["forwards"] or budget["iterations"]:
        limit = " ".join(f"{amount:,} {of}" for of, amount in budget.items() if amount)
    lines = [
        f"## {experiment['title']}",
        "",
        experiment["question"].strip(),
        "",
        f"`python scripts/reproduce.py assets/experiments/{experiment['name']}.yaml`: {limit} a run, seeds "
        f"{', '.join(map(str, experiment['seeds']))}. {made['date']}, commit {', '.join(made['commits'])}, "
        f"{'; '.join(made['machines'])}.",
    ]
    if result["missing"]:
        lines += ["", f"Not finished: {'; '.join(result['missing'])}."]
    lines += ["", *table(result), "", *claims(result)]
    lines += [f"![{name}](images/{name})" for name in plots(result)]
    return lines


def table(result: Found) -> list[str]:
    """A row an arm."""
    scores = [*result["experiment"]["scores"], "diversity"]
    columns = ["arm", "runs", "iterations", "forwards", "seconds"]
    columns += [name for score in scores for name in (score, "gain")]
    apart = any(arm["kl"]["value"] is not None for arm in result["arms"].values())
    columns += ["KL"] * apart  # of the path; there is none where texts are written
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, arm in result["arms"].items():
        cells = [name, str(arm["runs"]), str(arm["iterations"])]
        cells += [f"{arm['forwards']:,.0f}", f"{arm['seconds']:,.0f}"]
        for score in scores:
            entry = arm["scores"][score]
            cells += [
                f"{number(entry['base'])} → {number(entry['trained']['value'])}",
                interval(entry["gain"], sign=True),
            ]
        rows.append(f"| {' | '.join([*cells, *[interval(arm['kl'])] * apart])} |")
    return rows


def claims(result: Found) -> list[str]:
    """Shown or not, with the numbers."""
    lines = []
    for claim in result["claims"]:
        verdict = {True: "Shown", False: "Not shown", None: "Not measured"}[claim["shown"]]
        source = f" ({claim['source']})" if claim["source"] else ""
        lines += [f"**{verdict}**: {claim['text']}{source}", ""]
        for part in claim["parts"]:
            value = interval(part, sign=True) if part["known"] else "runs are missing"
            lines.append(f"- {part['what']}: {value}, wanted above {part['by']:g}")
        lines.append("")
    return lines


def number(value: float | None) -> str:
    return "∞ or none" if value is None else f"{value:.3f}"


def interval(entry: Mapping[str, float | None], sign: bool = False) -> str:
    """A value and its limits; JSON has null for what is not finite."""
    shape = "+.3f" if sign else ".3f"
    value, low, high = ("∞" if entry[side] is None else format(entry[side], shape) for side in LIMITS)
    return f"{value} [{low}, {high}]"


def plots(result: Found) -> dict[str, str]:
    """SVG by file name: each score and the diversity by forwards and by seconds, and the score by KL."""
    arms, name = result["arms"], result["experiment"]["name"]
    if not arms:
        return {}
    found = {}
    for score in (*result["experiment"]["scores"], "diversity"):
        for unit, scale, axis in (("forwards", 1e3, "thousand forwards"), ("seconds", 1.0, "seconds")):
            curves = []
            for arm, told in arms.items():
                along = told["along"][score]
                mean, low, high = (finite(along[side]) for side in LIMITS)
                curves.append(Line(arm, [x / scale for x in along[unit]], mean, low, high, dots=True))
            found[f"results_{name}_{score}_{unit}.svg"] = figure(curves, f"held-out {score}", axis)
    first = result["experiment"]["scores"][0]
    places = []
    for arm, told in arms.items():
        mean, low, high = (finite([told["scores"][first]["trained"][side]]) for side in LIMITS)
        places.append(Line(arm, finite([told["kl"]["value"]]), mean, low, high, dots=True))
    for across, up in result["experiment"].get("frontiers", []):
        ways = []
        for arm, told in arms.items():
            x = finite(told["along"][across]["value"])
            y, low, high = (finite(told["along"][up][side]) for side in LIMITS)
            ways.append(Line(arm, x, y, low, high, dots=True))
        found[f"results_{name}_{across}_{up}.svg"] = figure(ways, f"held-out {up}", f"held-out {across}")
    if all(math.isfinite(place.x[0]) for place in places):
        found[f"results_{name}_{first}_kl.svg"] = figure(places, f"held-out {first}", "KL, nats")
    return found


def finite(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
