"""What a run achieved, from the files in its folder: report.json for programs, report.html for people."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmalign import __version__, claims_page
from mmalign.charts import Line, bars, chart
from mmalign.evaluation import Evaluated, Score, claims_of, gain, no_nan
from mmalign.grids import data_uri
from mmalign.hacking import Parting, partings, trained_on
from mmalign.health import STATIC_ALARM, STATIC_RISE, STATIC_WINDOW
from mmalign.tracking import METRICS, SAMPLES, read, write_whole

EVALUATION, FACTS = "evaluation", "facts.json"
BASE, TRAINED, AVERAGE = "base", "trained", "average"
BEFORE_AFTER = "before_after.png"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Everything that a report is made from."""

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]  # device, versions, seconds of setup: what the files above do not tell
    rows: Sequence[Row]  # metrics.jsonl
    evaluated: Mapping[str, Evaluated]  # base, trained, average
    meanwhile: Mapping[int, Evaluated] = field(default_factory=dict)  # by step, during training

    @staticmethod
    def read(folder: Path) -> RunFiles:
        if not (folder / METRICS).is_file():
            raise FileNotFoundError(f"{folder} is no folder of a run: it has no {METRICS}")
        found = {
            name: Evaluated.load(path)
            for name in (BASE, TRAINED, AVERAGE)
            if (path := folder / EVALUATION / f"{name}.json").is_file()
        }
        config, facts = folder / "config.yaml", folder / FACTS
        return RunFiles(
            folder,
            yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
            json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {},
            read(folder / METRICS),
            found,
            {
                int(path.stem.rpartition("_")[2]): Evaluated.load(path)
                for path in sorted((folder / EVALUATION).glob("step_*.json"))
            },
        )

    def partings(self) -> list[Parting]:
        """Trained rewards against those that only watched, over all evaluations of the run."""
        at = {0: self.evaluated.get(BASE), **self.meanwhile, len(self.rows): self.evaluated.get(TRAINED)}
        known = {step: e for step, e in sorted(at.items()) if e is not None and step <= len(self.rows)}
        named = self.config.get("rewards") or {}
        trained = trained_on(self.config)
        watching = [name.partition("/")[0] for name in named if name.partition("/")[0] not in trained]
        return partings(list(known), list(known.values()), trained, watching)

    def column(self, name: str) -> list[float]:
        """A metric over the iterations that have it."""
        return [float(row[name]) for row in self.rows if row.get(name) is not None]

    def named(self, prefix: str) -> list[str]:
        """Metrics below a prefix, in the order in which they first came."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))


def write(folder: Path) -> dict[str, Any]:
    """Write report.json and report.html into a run's folder; the first is also the answer."""
    run = RunFiles.read(folder)
    result = summary(run)
    for name, text in (
        ("report.json", json.dumps(result, indent=2) + "\n"),
        ("report.html", page(run, result)),
        *((claims_page.PAGE, text) for text in claims_text(run)),
    ):
        write_whole(folder / name, text)
    return result


def claims_text(run: RunFiles) -> list[str]:
    """The page of the captions and their claims, if the run wrote captions."""
    files = {
        title: claims_of(run.folder / EVALUATION / f"{name}.pt")
        for name, title in ((BASE, "before"), (TRAINED, "after"))
    }
    columns = {title: claims_page.load(file) for title, file in files.items() if file.is_file()}
    if not columns or len({len(told) for told in columns.values()}) > 1:
        return []
    return [claims_page.page(f"{run.folder.name}: captions and their claims", columns)]


# Numbers


def summary(run: RunFiles) -> dict[str, Any]:
    """report.json: nested by topic, means beside their 95 % intervals."""
    seconds = {name.removeprefix("seconds/"): sum(run.column(name)) for name in run.named("seconds/")}
    iterations = seconds.pop("iteration", 0.0)
    watching = seconds.pop("evaluate", 0.0) + sum(e.seconds for e in run.evaluated.values())
    setup = float(run.facts.get("setup_seconds", 0.0))
    total = setup + iterations + sum(e.seconds for e in run.evaluated.values())
    forwards = {
        name: int(max(run.column(f"forwards/{name}"), default=0)) for name in ("sample", "train", "reference")
    }
    forwards["evaluation"] = sum(e.forwards for e in run.evaluated.values())
    training, evaluation = run.config.get("training", {}), run.config.get("evaluation", {})
    result: dict[str, Any] = {
        "name": run.folder.name,
        "iterations": len(run.rows),
        "heldout": heldout(run.evaluated),
        "heldout_by_category": by_category(run.evaluated),
        "diversity": diversity_of(run.evaluated),
        "hacking": [parting_of(parting) for parting in run.partings()],
        "static_alarm": [row["step"] + 1 for row in run.rows if row.get(STATIC_ALARM)],
        "rewards": {
            name.removeprefix("reward/"): ends(run.column(name))
            for name in run.named("reward/")
            if name.count("/") == 1
        },
        "seconds": {"total": total, **seconds, "evaluation": watching, "setup": setup},
        "forwards": forwards,
        "peak_memory_bytes": int(max(run.column("memory/peak_bytes"), default=0)),
        "seeds": {"training": training.get("seed"), "evaluation": evaluation.get("seed")},
        **{
            name: run.facts[name]
            for name in ("device", "processes", "versions", "heldout_file")
            if name in run.facts
        },
        "version": __version__,
    }
    fixed: dict[str, Any] = no_nan(result)
    return fixed


def heldout(evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
    """score -> base, trained, gain and their intervals."""
    names = list(dict.fromkeys(name for e in evaluated.values() for name in e.scores))
    table: dict[str, Any] = {}
    for name in names:
        entry: dict[str, Any] = {}
        for which, e in evaluated.items():
            if name in e.scores:
                entry |= told(which, e.scores[name])
        if BASE in evaluated and TRAINED in evaluated and both(evaluated, name):
            entry |= told("gain", gain(evaluated[BASE], evaluated[TRAINED], name))
        table[name] = entry
    return table


def parting_of(parting: Parting) -> dict[str, Any]:
    """What a trained and a watching reward did after the watching one was best."""
    return {
        "trained": parting.trained,
        "watching": parting.watching,
        "parted": parting.parted,
        "step": parting.step,
        **told("rise", parting.rise),
        **told("fall", parting.fall),
    }


def both(evaluated: Mapping[str, Evaluated], name: str) -> bool:
    base, trained = evaluated[BASE].by_prompt.get(name, []), evaluated[TRAINED].by_prompt.get(name, [])
    return bool(base) and len(base) == len(trained)


def told(name: str, score: Score) -> dict[str, Any]:
    return {name: score.mean, f"{name}_interval": [score.low, score.high]}


def by_category(evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for which, e in evaluated.items():
        for name, kinds in e.categories.items():
            for kind, score in kinds.items():
                if score.images:
                    table.setdefault(name, {}).setdefault(kind, {}).update(told(which, score))
    return table


def diversity_of(evaluated: Mapping[str, Evaluated]) -> dict[str, float | None]:
    values = {which: e.diversity for which, e in evaluated.items()}
    base, trained = values.get(BASE), values.get(TRAINED)
    return {**values, "ratio": trained / base if base and trained is not None else None}


def ends(values: Sequence[float], share: float = 0.1) -> dict[str, float]:
    """The mean of the first and of the last tenth of a curve."""
    if not values:
        return {"first": math.nan, "last": math.nan}
    width = max(1, round(len(values) * share))
    return {"first": sum(values[:width]) / width, "last": sum(values[-width:]) / width}


# The page

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, "Segoe UI", sans-serif; color: #18181b; background: #fafafa; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.6rem; margin: 0; letter-spacing: -.01em } h2 { font-size: 1.1rem; margin: 2.6rem 0 .8rem }
h3 { font-size: .9rem; margin: 0 0 .4rem; font-weight: 600 }
p { margin: .3rem 0 } .soft, .none { color: #71717a } code { font-size: .85em }
.tiles, .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px }
.tiles { margin-top: 1.4rem }
.card { background: #fff; border: 1px solid #e4e4e7; border-radius: 10px; padding: 14px 16px }
.tile b { font-size: 1.4rem; font-weight: 600; display: block; line-height: 1.25; letter-spacing: -.02em }
.tile span { color: #71717a; font-size: .84rem }
.good { color: #15803d } .bad { color: #b91c1c }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)) }
svg { width: 100%; height: auto; display: block } svg text { font: 11px system-ui, sans-serif; fill: #71717a }
.rule { stroke: #ececef; fill: none } .line { fill: none; stroke-width: 1.2 } .bold { stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .8rem; color: #3f3f46; margin-top: 4px }
.legend i { width: 10px; height: 10px; border-radius: 3px; display: inline-block; margin-right: 5px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #f0f0f2 }
th { font-weight: 500; color: #71717a }
th:first-child, td:first-child { text-align: left } tr:last-child td { border: 0 } td small { color: #a1a1aa }
tr.sub td:first-child { padding-left: 26px; color: #52525b }
img { max-width: 100%; height: auto; display: block; border-radius: 6px }
details { margin-top: 12px } summary { cursor: pointer; color: #52525b }
pre { overflow: auto; font-size: .8rem }
"""


def page(run: RunFiles, result: Mapping[str, Any]) -> str:
    """report.html, complete in one file."""
    name = html.escape(str(result["name"]))
    sections = [
        head(run, result),
        tiles(result),
        heldout_section(result),
        hacking_section(run, result),
        pictures(run),
        curves(run),
        health(run, result),
        cost(run, result),
        settings(run),
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{name}</title><style>{STYLE}</style><main>{''.join(sections)}</main></html>\n"
    )


def head(run: RunFiles, result: Mapping[str, Any]) -> str:
    config = run.config
    told = [
        f"{config.get('algorithm', {}).get('name', '?')} on {config.get('policy', {}).get('model', '?')}",
        f"{result['iterations']} iterations",
        f"seed {config.get('training', {}).get('seed', '?')}",
        str(result.get("device", "")),
        f"mmalign {__version__}",
    ]
    line = html.escape(" · ".join(part for part in told if part))
    return f"<h1>{html.escape(str(result['name']))}</h1><p class=soft>{line}</p>"


def tiles(result: Mapping[str, Any]) -> str:
    """The few numbers that one looks for first."""
    shown: list[str] = []
    known = [name for name in ("strict", "soft") if name in result["heldout"]] or list(result["rewards"])[:2]
    for name, entry in result["heldout"].items():
        if name not in known:
            continue
        if entry.get("gain") is not None:
            low, high = entry["gain_interval"]
            tone = tone_of(low, high)
            shown.append(
                tile(
                    f"{short(entry['base'])} → {short(entry['trained'])}",
                    f"held-out {name}, gain {signed(entry['gain'])} {between(low, high, True)}",
                    tone,
                )
            )
    diversity = result["diversity"]
    if diversity.get("ratio") is not None:
        shown.append(tile(f"{diversity['ratio']:.0%}", "diversity, share of the base's", ""))
    shown.append(tile(duration(result["seconds"]["total"]), f"in all, {result['iterations']} iterations", ""))
    if result["peak_memory_bytes"]:
        shown.append(tile(f"{result['peak_memory_bytes'] / 2**30:.2f} GiB", "peak memory", ""))
    return f"<div class=tiles>{''.join(shown)}</div>"


def tile(value: str, text: str, tone: str) -> str:
    value, text = html.escape(value), html.escape(text)
    return f'<div class="card tile"><b class="{tone}">{value}</b><span>{text}</span></div>'


def heldout_section(result: Mapping[str, Any]) -> str:
    """Base against trained, in all and by category."""
    table = result["heldout"]
    if not table:
        return ""
    columns = [which for which in (BASE, TRAINED, AVERAGE) if any(which in entry for entry in table.values())]
    judged = ("strict", "soft", *result["rewards"])  # what is more of is better
    rows = []
    for name, entry in table.items():
        rows.append(
            f"<tr><td>{html.escape(name)}</td>{cells(entry, columns)}{gain_cell(entry, name in judged)}</tr>"
        )
        for kind, score in result["heldout_by_category"].get(name, {}).items():
            if name in ("strict", "soft"):
                kind = html.escape(kind.replace("_", " "))
                rows.append(f"<tr class=sub><td>{kind}</td>{cells(score, columns)}<td></td></tr>")
    diversity = result["diversity"]
    if diversity.get(BASE) is not None:
        values = "".join(f"<td>{short(diversity.get(which))}</td>" for which in columns)
        ratio = f"{diversity['ratio']:.0%}" if diversity.get("ratio") is not None else ""
        rows.append(f"<tr><td>diversity inside a prompt</td>{values}<td>{ratio}</td></tr>")
    head = "".join(f"<th>{which}</th>" for which in (*columns, "gain"))
    where = result.get("heldout_file")
    note = "Mean over prompts, 95 % bootstrap interval over prompts; the gain is paired by prompt"
    note += f". Prompts: {where}." if where else "."
    return (
        f"<h2>Held-out prompts</h2>"
        f"<div class=card><table><tr><th>score</th>{head}</tr>{''.join(rows)}</table></div>"
        f"<p class=soft>{html.escape(note)}</p>"
    )


def hacking_section(run: RunFiles, result: Mapping[str, Any]) -> str:
    """Trained rewards beside those that only watched, and where they part."""
    if not result["hacking"]:
        return ""
    said = []
    for entry in result["hacking"]:
        pair = f"{html.escape(entry['trained'])} against {html.escape(entry['watching'])}"
        if entry["parted"]:
            rise, fall = (
                f"{signed(entry[x])} {between(entry[f'{x}_interval'][0], entry[f'{x}_interval'][1], True)}"
                for x in ("rise", "fall")
            )
            said.append(
                f"<p class=bad>{pair}: they part after {entry['step']} iterations. From there to the end the "
                f"trained reward gained {rise}, the watching one {fall}: a sign of hacking.</p>"
            )
        else:
            said.append(f"<p class=soft>{pair}: they do not part.</p>")
    names = list(dict.fromkeys(e[side] for e in result["hacking"] for side in ("trained", "watching")))
    lines = [in_deviations(run, line) for name in names for line in heldout_line(run, name)]
    return section(
        "Trained against watching rewards", [("Gain in deviations over prompts", chart(lines))]
    ) + ("".join(said))


def in_deviations(run: RunFiles, line: Line) -> Line:
    """A held-out score as its gain over the base in deviations over the base's prompts."""
    values = [x for x in run.evaluated[BASE].by_prompt[line.name] if math.isfinite(x)]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values)) or 1.0
    return replace(line, y=[(y - line.y[0]) / spread for y in line.y])


def cells(entry: Mapping[str, Any], columns: Sequence[str]) -> str:
    out = []
    for which in columns:
        low, high = entry.get(f"{which}_interval", (None, None))
        out.append(f"<td>{short(entry.get(which))} <small>{between(low, high)}</small></td>")
    return "".join(out)


def tone_of(low: float | None, high: float | None) -> str:
    """Whether an interval lies on one side of 0."""
    return "good" if (low or 0) > 0 else "bad" if (high or 0) < 0 else ""


def gain_cell(entry: Mapping[str, Any], judged: bool) -> str:
    if entry.get("gain") is None:
        return "<td></td>"
    low, high = entry["gain_interval"]
    tone = tone_of(low, high) if judged else ""
    value, interval = signed(entry["gain"]), between(low, high, True)
    return f'<td><span class="{tone}">{value}</span> <small>{interval}</small></td>'


def pictures(run: RunFiles) -> str:
    """Before and after, and the same prompts and seeds along the way."""
    samples = run.folder / SAMPLES
    out: list[str] = []
    if claims_text(run):
        out.append(f'<p><a href="{claims_page.PAGE}">Captions, their claims underlined by verdict</a></p>')
    if (samples / BEFORE_AFTER).is_file():
        out.append(f"<h2>Before and after</h2><div class=card>{picture(samples / BEFORE_AFTER)}</div>")
    steps = sorted(samples.glob("step_*.png"))
    chosen = [steps[i * (len(steps) - 1) // 3] for i in range(4)] if len(steps) > 4 else steps
    for path in chosen if len(steps) > 1 or not out else []:
        step = int(path.stem.rpartition("_")[2])
        when = f"after {step} iterations" if step else "before training"
        out.append(
            f"<details><summary>The same prompts and seeds {when}</summary>"
            f"<div class=card>{picture(path)}</div></details>"
        )
    return "".join(out)


def picture(path: Path) -> str:
    with Image.open(path) as image:
        return f'<img src="{data_uri(image.convert("RGB"))}" alt="{html.escape(path.stem)}">'


def line_of(run: RunFiles, name: str, label: str = "", less: float = 0.0) -> Line:
    """A metric over the iterations, `less` a constant."""
    points = [(row["step"] + 1, row[name] - less) for row in run.rows if row.get(name) is not None]
    return Line(label, [x for x, _ in points], [y for _, y in points], smooth=max(1, len(points) // 15))


SHARES = ("strict", "soft")  # scores between 0 and 1 that rewards tell beside their value


def curves(run: RunFiles) -> str:
    """What training saw, and what held-out prompts said meanwhile."""
    rewards = [name.removeprefix("reward/") for name in run.named("reward/") if name.count("/") == 1]
    found = []
    for reward in rewards:
        parts = {"": f"reward/{reward}"} | {name: f"reward/{reward}/{name}" for name in SHARES}
        lines = [line_of(run, path, name or reward) for name, path in parts.items() if run.column(path)]
        found.append((f"Training: {reward}", chart(lines)))
    shares = [line for name in SHARES for line in heldout_line(run, name)]
    if shares:
        found.append((f"Held out: {' and '.join(line.name for line in shares)}", chart(shares)))
    if not shares:
        lines_of = {reward: heldout_line(run, reward) for reward in rewards}
        found += [(f"Held out: {reward}", chart(line)) for reward, line in lines_of.items() if line]
    if line := heldout_line(run, "diversity"):
        found.append(("Held out: diversity", chart(line, floor=0.0)))
    return section("Curves", found)


def heldout_line(run: RunFiles, name: str) -> list[Line]:
    """A held-out score before, during and after training."""
    path = f"heldout/{name}"
    at = {row["step"] + 1: row[path] for row in run.rows if row.get(path) is not None}
    for which, step in ((BASE, 0), (TRAINED, len(run.rows))):
        if which in run.evaluated:
            found = run.evaluated[which]
            if name == "diversity" and found.diversity is not None:
                at[step] = found.diversity
            elif name in found.scores:
                at[step] = found.scores[name].mean
    steps = sorted(at)
    return [Line(name, steps, [at[step] for step in steps], dots=True)] if steps else []


HEALTH = {
    "Log-ratio: largest, and noise floor": ("log_ratio_max", "noise_floor/max"),
    "Mean ratio, less 1": ("ratio",),
    "Clip share": ("clip_share",),
    "Groups without variance": ("groups/flat_share",),
    "Spread of rewards inside groups": ("*/group_std",),
    "Samples without a verdict": ("*/missing",),
    "Videos that stand still": ("reward/*/static",),
    "KL to the reference": ("kl",),
    "Gradient norm": ("grad_norm",),
    "Scale of the loss in fp16": ("loss_scale",),
    "Reward: share of the time": ("share/reward",),
}


def health(run: RunFiles, result: Mapping[str, Any]) -> str:
    """Whether the update did what it should."""
    found = []
    for title, patterns in HEALTH.items():
        names = [name for pattern in patterns for name in run.named("") if fnmatch(name, pattern)]
        if names:
            label = {
                name: name.removeprefix("reward/").partition("/")[0] if "*" in patterns[0] else name
                for name in names
            }
            lines = [line_of(run, name, label[name], less=float(name == "ratio")) for name in names]
            found.append((title, chart(lines, floor=0.0)))
    return section("Health", found) + static_line(run, result)


def static_line(run: RunFiles, result: Mapping[str, Any]) -> str:
    """Whether the alarm against videos that stand still rang; nothing where no reward tells of them."""
    rang, known = result["static_alarm"], len(run.column(STATIC_ALARM))
    if not known:
        return ""
    if not rang:
        return "<p class=soft>Static alarm: silent.</p>"
    return (
        f"<p class=bad>Static alarm: it rang in {len(rang)} of {known} iterations, first in iteration "
        f"{rang[0]}. The share of videos that stand still was more than {STATIC_RISE:g} above that of the "
        f"first {STATIC_WINDOW} iterations: a sign of hacking.</p>"
    )


def section(title: str, charts_: Sequence[tuple[str, str]]) -> str:
    if not charts_:
        return ""
    inside = "".join(f"<div class=card><h3>{html.escape(name)}</h3>{body}</div>" for name, body in charts_)
    return f"<h2>{title}</h2><div class=charts>{inside}</div>"


NOT_PHASES = ("total", "setup", "evaluation")


def cost(run: RunFiles, result: Mapping[str, Any]) -> str:
    """Where the time went."""
    seconds = result["seconds"]
    phases = sorted(
        ((name, value) for name, value in seconds.items() if name not in NOT_PHASES and value),
        key=lambda p: -p[1],
    )
    forwards = ", ".join(f"{count:,} {name}" for name, count in result["forwards"].items() if count)
    watching, setup = seconds["evaluation"], seconds["setup"]
    training = seconds["total"] - watching - setup
    facts = [
        f"Training {duration(training)}, evaluation {duration(watching)}, setup {duration(setup)}.",
        f"Sample-forwards of the network: {forwards}." if forwards else "",
    ]
    return section("Cost", [("Share of each phase in an iteration", bars(phases))]) + "".join(
        f"<p class=soft>{fact}</p>" for fact in facts if fact
    )


def settings(run: RunFiles) -> str:
    text = html.escape(yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True))
    return f"<h2>Settings</h2><details><summary>config.yaml</summary><pre class=card>{text}</pre></details>"


def short(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def between(low: float | None, high: float | None, sign: bool = False) -> str:
    if low is None or high is None or not math.isfinite(low):
        return ""
    return f"[{low:+.3f}, {high:+.3f}]" if sign else f"[{low:.3f}, {high:.3f}]"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
