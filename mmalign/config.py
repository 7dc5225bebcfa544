"""One YAML file to typed settings, strictly.

Every section is a frozen dataclass that lives beside what it configures; this module only composes them.
They are validated by pydantic, which also writes the schema; what a field means is the comment in its source.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmalign.algorithms import ALGORITHMS
from mmalign.compositions import COMPOSITIONS, Composition
from mmalign.contracts import PolicySettings
from mmalign.data import PromptSettings
from mmalign.evaluation import EvaluationSettings
from mmalign.trainer import TrainingSettings

T = TypeVar("T")
Raw = dict[str, Any]  # a mapping as YAML gives it


class ConfigError(ValueError):
    """Settings that cannot be run; the message says where, what, and what would be right."""


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, and to whom it reports."""

    dir: str = ""  # folder of the run; empty: runs/ and the name of the configuration file
    tensorboard: bool = True  # write TensorBoard events into the folder
    wandb: str = ""  # project at Weights & Biases; empty: none (needs the extra mmalign[wandb])
    rollouts: int = 1  # write the rollouts of every n-th iteration; 0: none


@dataclass(frozen=True)
class RewardSettings:
    """How much a reward counts, and what its constructor is given."""

    # Share in the sum; 0 watches the reward without training on it. {iteration: weight} changes it during
    # training, along straight lines between the iterations given.
    weight: float | Mapping[int, float] = 1.0
    settings: Mapping[str, object] = field(
        default_factory=dict
    )  # every other key: a setting of the reward itself

    @property
    def schedule(self) -> Mapping[int, float]:
        return self.weight if isinstance(self.weight, Mapping) else {0: self.weight}


class AlgorithmSettings(Protocol):
    """What every entry of the table of algorithms can do."""

    def build(self, weights: Mapping[str, float]) -> Any: ...


@dataclass(frozen=True)
class RunConfig:
    """All that a run depends on."""

    policy: PolicySettings
    prompts: PromptSettings
    rewards: Mapping[str, RewardSettings]
    method: str
    algorithm: AlgorithmSettings
    composition: Composition | None  # null: rewards are added up as the method does it
    training: TrainingSettings
    evaluation: EvaluationSettings
    run: RunSettings

    @property
    def weights(self) -> dict[str, float | Mapping[int, float]]:
        return {name: reward.weight for name, reward in self.rewards.items()}

    @property
    def composed(self) -> str | None:
        """The name of the composition."""
        return next((name for name, kind in COMPOSITIONS.items() if type(self.composition) is kind), None)

    def to_dict(self) -> Raw:
        """The settings as plain values, in the form that `load_config` reads."""
        sections: Raw = {name: plain(getattr(self, name)) for name in SECTIONS}
        sections["rewards"] = {
            name: {"weight": plain(reward.weight), **plain(reward.settings)}
            for name, reward in self.rewards.items()
        }
        sections["algorithm"] = {"name": self.method, **plain(self.algorithm)}
        sections["composition"] = self.composition and {"name": self.composed, **plain(self.composition)}
        return {name: sections[name] for name in ORDER}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


SECTIONS: dict[str, type] = {
    "policy": PolicySettings,
    "prompts": PromptSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
}
ORDER = ("policy", "prompts", "rewards", "algorithm", "composition", "training", "evaluation", "run")


def plain(value: object) -> Any:
    """Dataclasses, tuples and paths as what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# Reading


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (as in YAML 1.2) and a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark and source != COMMAND_LINE else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{place}: this is not YAML: {problem}") from None


COMMAND_LINE = "command line"


def split_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`training.iterations=3` to (("training", "iterations"), 3); values are YAML.

    The name of a reward of one's own holds dots itself and stays whole: `rewards.my_pkg.mine:Mine.weight=2`.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is no override; write section.field=value")
    own = re.fullmatch(r"rewards\.([^:]+:\w+)(?:\.(\w+))?", path.strip())
    parts = ("rewards", *(p for p in own.groups() if p)) if own else tuple(path.strip().split("."))
    return parts, parse_yaml(value, COMMAND_LINE)


def override(raw: Raw, parts: Sequence[str], value: Any) -> None:
    """Set a value deep in `raw`; mappings on the way are made, and a bare weight becomes one."""
    *way, last = parts
    here = raw
    for part in way:
        below = here.get(part)
        if parts[0] == "rewards" and isinstance(below, int | float):
            below = {"weight": below}
        here[part] = here = dict(below) if isinstance(below, Mapping) else {}
    here[last] = value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in a file, with `section.field=value` put over them; everything wrong is said at once."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {path}{_recipes_hint(path)}")
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected the sections {', '.join(ORDER)}, got {raw!r}")
    changed = [split_override(text) for text in overrides]
    for parts, value in changed:
        override(raw, parts, value)
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{path.stem}"
    return validate(raw, str(path), [parts for parts, _ in changed])


def _recipes_hint(path: Path) -> str:
    known = [str(p) for p in recipes()]
    close = get_close_matches(str(path), known, 1, 0.6) or get_close_matches(
        path.stem, [Path(k).stem for k in known], 1, 0.6
    )
    return f"; did you mean {close[0]}?" if close else ""


def recipes() -> list[Path]:
    """Recipes of the working directory, else those of the checkout this package was imported from."""
    for root in (Path(), Path(__file__).resolve().parent.parent):
        found = sorted((root / "assets" / "recipes").glob("*.yaml"))
        if found:
            return found
    return []


def recipe(name: str) -> Path:
    """The file of a recipe that is named by its file or by its name alone."""
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in recipes()}
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}{nearest(name, known)}")
    return known[name]


# Validating


def validate(raw: Raw, source: str, changed: Sequence[Sequence[str]] = ()) -> RunConfig:
    """Typed settings from a mapping; `changed` are the paths that the command line set."""
    faults: list[str] = []
    blame = _Blame(source, [tuple(parts) for parts in changed])
    for key in [str(key) for key in raw if key not in ORDER]:
        faults.append(f"{blame(key)}: there is no section {key!r}{nearest(key, ORDER)}")  # noqa: PERF401
    sections: Raw = {}
    for name, kind in SECTIONS.items():
        sections[name] = _check(raw.get(name) or {}, kind, (name,), blame, faults)
    rewards = _rewards(raw.get("rewards"), blame, faults)
    method, algorithm = _algorithm(raw.get("algorithm"), blame, faults)
    composition = _composition(raw.get("composition"), blame, faults)
    prompts = sections["prompts"]
    if prompts and algorithm and prompts.group < 2 and not getattr(algorithm, "alone", False):
        faults.append(
            f"{blame('prompts', 'group')}: prompts.group must be at least 2, because members are compared, "
            f"got {prompts.group}"
        )
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    assert algorithm is not None
    return RunConfig(**sections, rewards=rewards, method=method, algorithm=algorithm, composition=composition)


def section(name: str, raw: Raw, source: str, kind: type[T]) -> T:
    """One section on its own."""
    faults: list[str] = []
    found: T | None = _check(raw.get(name) or {}, kind, (name,), _Blame(source, []), faults)
    if found is None:
        raise ConfigError("\n".join(faults))
    return found


def check_rewards(raw: Raw, source: str) -> dict[str, RewardSettings]:
    """The section of rewards on its own."""
    faults: list[str] = []
    found = _rewards(raw, _Blame(source, []), faults)
    if faults:
        raise ConfigError("\n".join(faults))
    return found


@dataclass(frozen=True)
class _Blame:
    """Who wrote a value: the file, or the command line."""

    source: str
    changed: list[tuple[str, ...]]

    def __call__(self, *path: str) -> str:
        on_top = any(parts[: len(path)] == path or path[: len(parts)] == parts for parts in self.changed)
        return COMMAND_LINE if on_top else self.source


def _check(value: Any, kind: Any, path: tuple[str, ...], blame: _Blame, faults: list[str]) -> Any:
    """`value` as a `kind`, or None and one line in `faults` for each thing wrong."""
    try:
        return adapter(kind).validate_python({"": filled(kind, value)})[""]
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            at = tuple(str(part) for part in fault["loc"][1:])
            faults.append(_say(fault, kind, path, at, blame))
        return None


def filled(kind: type, value: Any) -> Any:
    """`value` with the defaults of `kind` below what it says of nested settings.

    A method may have other defaults for nested settings than their class; saying one field keeps the rest.
    """
    if not isinstance(value, Mapping):
        return value
    given, hints = dict(value), typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        below, inner = settings_in(hints[f.name]), given.get(f.name)
        if below is None or not isinstance(inner, Mapping):
            continue
        default = default_of(f)
        start = (
            {g.name: getattr(default, g.name) for g in dataclasses.fields(below)}
            if default is not None
            else {}
        )
        given[f.name] = filled(below, {**start, **inner})
    return given


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default of a field, None where it has none."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return None if f.default is dataclasses.MISSING else f.default


@cache
def adapter(kind: type[Any]) -> TypeAdapter[dict[str, Any]]:
    """Validates {"": value}; through the outer dict unknown keys are forbidden at every depth."""
    outer: Any = dict[str, kind]  # type: ignore[valid-type]
    return TypeAdapter(outer, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))


def _say(fault: Any, kind: type, path: tuple[str, ...], at: tuple[str, ...], blame: _Blame) -> str:
    """One fault found by pydantic in one line of ours."""
    where = ".".join((*path, *at))
    owner = kind
    for part in at[:-1]:
        owner = settings_in(typing.get_type_hints(owner).get(part)) or owner
    if fault["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(owner)]
        return (
            f"{blame(*path, *at)}: {'.'.join((*path, *at[:-1]))} ({owner.__name__}) has no setting {at[-1]!r}"
            f"{nearest(at[-1], known)}"
        )
    if fault["type"] == "missing":
        meaning = comments(owner).get(at[-1]) if at else None
        return (
            f"{blame(*path, *at)}: {where} is missing ({owner.__name__}.{at[-1]}{meaning and ': ' + meaning})"
        )
    if fault["type"] == "value_error":
        said = str(fault["ctx"]["error"])
        return f"{blame(*path, *at)}: {said if said.startswith(where) else f'{where}: {said}'}"
    message = fault["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{blame(*path, *at)}: {where} {message}, got {fault['input']!r}"


def _rewards(value: Any, blame: _Blame, faults: list[str]) -> dict[str, RewardSettings]:
    if not isinstance(value, Mapping) or not value:
        faults.append(
            f"{blame('rewards')}: rewards must name at least one reward and its weight, such as "
            f"{{lab: 1.0}}, got {value!r}"
        )
        return {}
    rewards = {}
    for name, given in value.items():
        if given is None:  # `rewards.lab=null` on the command line takes a reward out
            continue
        source = blame("rewards", str(name))
        whole = isinstance(given, Mapping) and _weight(given) is None  # else it is a weight by iteration
        given = {str(key): item for key, item in given.items()} if whole else {"weight": given}
        weight = given.pop("weight", 1.0)
        if (known := _weight(weight)) is None:
            faults.append(
                f"{source}: rewards.{name}: the weight must be a number, got {weight!r}, or numbers by "
                "iteration, such as {0: 1.0, 50: 0.2}"
            )
            continue
        if fault := _unknown_reward(str(name), given):
            faults.append(f"{source}: {fault}")
        rewards[str(name)] = RewardSettings(known, given)
    return rewards


def _weight(value: object) -> float | dict[int, float] | None:
    """A weight, or weights by iteration, of what a file says; None if it is neither."""
    if isinstance(value, Mapping) and value:
        found = {key: _weight(item) for key, item in value.items()}
        numbers = {int(k): v for k, v in found.items() if str(k).isdecimal() and isinstance(v, float)}
        return numbers if len(numbers) == len(found) else None
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def _composition(value: Any, blame: _Blame, faults: list[str]) -> Composition | None:
    if value is None:
        return None
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = given.pop("name", None)
    if name not in COMPOSITIONS:
        missing = "composition.name is missing" if name is None else f"there is no composition {name!r}"
        faults.append(f"{blame('composition')}: {missing}{nearest(str(name), COMPOSITIONS)}")
        return None
    found: Composition | None = _check(given, COMPOSITIONS[name], ("composition",), blame, faults)
    return found


def _unknown_reward(name: str, settings: Mapping[str, object]) -> str | None:
    """What is wrong with the name of a reward or with the names of its settings."""
    from mmalign.rewardmodels import REWARDS

    whole, kind_of = name, name.partition("/")[0]
    name = kind_of if kind_of in REWARDS else name
    if name not in REWARDS and ":" not in name:
        return (
            f"there is no reward {name!r}{nearest(name, REWARDS)}; "
            f"a reward of your own is named by its path, my_package.my_file:MyReward"
        )
    if ":" in name:
        return None
    known = {f.path.rpartition(".")[2]: f for f in fields(named_class(REWARDS[name]), "")}
    for key in settings:
        if key not in known:
            return f"rewards.{whole} has no setting {key!r}{nearest(key, ['weight', *known])}"
    for key, setting in known.items():
        if setting.required and key not in settings:
            return f"rewards.{whole}.{key} is missing ({setting.meaning})"
    return None


def _algorithm(value: Any, blame: _Blame, faults: list[str]) -> tuple[str, AlgorithmSettings | None]:
    given = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = given.pop("name", None)
    if name is None:
        faults.append(
            f"{blame('algorithm')}: algorithm.name is missing; it is one of {', '.join(sorted(ALGORITHMS))}"
        )
        return "", None
    if name not in ALGORITHMS and ":" not in str(name):
        faults.append(f"{blame('algorithm')}: there is no algorithm {name!r}{nearest(str(name), ALGORITHMS)}")
        return str(name), None
    try:
        kind = algorithm_class(str(name))
    except (ImportError, AttributeError) as error:
        faults.append(f"{blame('algorithm')}: algorithm.name: cannot import {name!r}: {error}")
        return str(name), None
    return str(name), _check(given, kind, ("algorithm",), blame, faults)


def algorithm_class(name: str) -> type[Any]:
    return named_class(ALGORITHMS.get(name, name))


def named_class(path: str) -> type[Any]:
    """The class named `module:Class`."""
    module, _, attribute = path.partition(":")
    kind = getattr(import_module(module), attribute)
    if not isinstance(kind, type):
        raise AttributeError(f"{path} is a {type(kind).__name__}, not a class")
    return kind


def nearest(name: str, known: Iterator[str] | Sequence[str] | Mapping[str, object]) -> str:
    """The end of a message about an unknown name: the closest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; it is one of {', '.join(names)}"


# Explaining


@dataclass(frozen=True)
class Field:
    """One setting as a person meets it."""

    path: str
    type: str
    default: str  # empty: none, the setting must be given
    meaning: str

    @property
    def required(self) -> bool:
        return not self.default


@cache
def comments(kind: type) -> dict[str, str]:
    """What the source says of the fields of a dataclass: comments above each and the one behind it."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        said = {
            token.start[0]: (token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            lines: list[str] = []
            above = node.lineno - 1
            while above in said and said[above][1]:
                lines.insert(0, said[above][0])
                above -= 1
            lines += [said[n][0] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in said]
            if lines:
                found[node.target.id] = " ".join(lines)
    return found


def settings_in(hint: object) -> type | None:
    """The dataclass that a type hint is or may be (`X | None`)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for part in (hint, *(typing.get_args(hint) if union else ())):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part
    return None


def type_name(hint: object) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return "null" if hint is type(None) else hint.__name__
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        return f"list of {type_name(inner[0])}" + ("" if inner[-1] is ... else f" ({len(inner)})")
    if typing.get_origin(hint) is Mapping:
        return f"mapping of {type_name(typing.get_args(hint)[1])}"
    if typing.get_origin(hint) is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    return str(hint).replace("typing.", "")


def fields(kind: type, path: str, default: Any = None) -> Iterator[Field]:
    """Every setting of a dataclass, nested ones by dotted names; default: an instance that tells defaults."""
    hints, said = typing.get_type_hints(kind), comments(kind)
    for f in dataclasses.fields(kind):
        below = settings_in(hints[f.name])
        value = default_of(f) if default is None else getattr(default, f.name)
        if below:
            yield from fields(below, f"{path}.{f.name}", value)
            continue
        needed = default is None and f.default is f.default_factory is dataclasses.MISSING
        yield Field(
            f"{path}.{f.name}", type_name(hints[f.name]), "" if needed else show(value), said.get(f.name, "")
        )


def show(value: object) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(plain(value), ensure_ascii=False)


def first_sentence(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def chapters() -> Iterator[tuple[str, str, list[Field]]]:
    """(title, what it is, fields) for every section, every algorithm and every reward."""
    from mmalign.rewardmodels import REWARDS

    for name in ORDER:
        if name == "algorithm":
            for method in sorted(ALGORITHMS):
                kind = algorithm_class(method)
                yield f"algorithm: {method}", first_sentence(kind), list(fields(kind, "algorithm"))
        elif name == "composition":
            for rule, made in sorted(COMPOSITIONS.items()):
                yield f"composition: {rule}", first_sentence(made), list(fields(made, "composition"))
        elif name == "rewards":
            text = "Each reward by name: a weight, or a mapping of weight and the reward's own settings."
            rows = [_reward_rows(reward, path) for reward, path in sorted(REWARDS.items())]
            yield "rewards", text, [row for group in rows for row in group]
        else:
            yield name, first_sentence(SECTIONS[name]), list(fields(SECTIONS[name], name))


def _reward_rows(name: str, path: str) -> list[Field]:
    kind = named_class(path)
    first = Field(f"rewards.{name}", "float | mapping", "not used", first_sentence(kind))
    return [first, *fields(kind, f"rewards.{name}")]


def explain(width: int = 110) -> str:
    """Every setting, for `--help`."""
    lines = []
    for title, text, rows in chapters():
        lines += ["", f"{title}: {text}" if title != text else title]
        for row in rows:
            value = "required" if row.required else f"default {row.default}"
            lines.append(f"  {row.path}  ({row.type}, {value})" if row.type else f"  {row.path}  ({value})")
            lines += textwrap.wrap(row.meaning, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).lstrip("\n")


def markdown() -> str:
    """Every setting, for `docs/configuration.md`."""
    lines = [MARKDOWN_HEAD.strip()]
    for title, text, rows in chapters():
        lines += [
            "",
            f"## {title}",
            "",
            text,
            "",
            "| setting | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for row in rows:
            cells = (
                f"`{row.path}`",
                row.type,
                "**required**" if row.required else f"`{row.default}`",
                row.meaning,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


MARKDOWN_HEAD = """
# Configuration

Made from the source by `mmalign schema --markdown`; a test keeps it current.

A run is one YAML file with the sections below. Any field can be changed on the command line, where values are
YAML: `mmalign train --config assets/recipes/lab_flow_grpo.yaml training.iterations=3 run.dir=runs/mine`.
Unknown keys are refused. The resolved settings are written into the run's folder as `config.yaml`, which can
be run again. What follows from the settings (batches, updates, forwards) is printed as a plan, never set.

A reward of your own is one Python file, named by the path of its class; the working directory is on the path:

```yaml
rewards:
  lab: 1.0
  my_package.my_reward:MyReward: {weight: 0.5, threshold: 3}
```
"""


def json_schema() -> Raw:
    """A JSON schema of the whole file, for editors."""
    definitions: Raw = {}
    properties: Raw = {name: _schema_of(kind, definitions) for name, kind in SECTIONS.items()}
    properties["algorithm"] = {
        "description": "What turns rewards into updates.",
        "oneOf": [_named_schema(name, algorithm_class(name), definitions) for name in sorted(ALGORITHMS)],
    }
    properties["composition"] = {
        "description": "What becomes of several rewards; without it they are added up as the method does it.",
        "oneOf": [
            {"type": "null"},
            *(_named_schema(name, kind, definitions) for name, kind in sorted(COMPOSITIONS.items())),
        ],
    }
    properties["rewards"] = _rewards_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmalign recipe",
        "type": "object",
        "properties": {name: properties[name] for name in ORDER},
        "required": ["policy", "prompts", "rewards", "algorithm"],
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema_of(kind: type, definitions: Raw) -> Raw:
    """The schema of a dataclass, put into `definitions` with what the source says of each field."""
    schema = adapter(kind).json_schema(ref_template="#/$defs/{model}")
    for name, definition in schema["$defs"].items():
        definitions[name] = definition
    _describe(kind, definitions)
    definitions[kind.__name__]["description"] = first_sentence(kind)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _describe(kind: type, definitions: Raw) -> None:
    hints, said = typing.get_type_hints(kind), comments(kind)
    for name, schema in definitions[kind.__name__].get("properties", {}).items():
        schema.pop("title", None)
        if name in said:
            schema["description"] = said[name]
        below = settings_in(hints[name])
        if below:
            _describe(below, definitions)


def _named_schema(name: str, kind: type, definitions: Raw) -> Raw:
    _schema_of(kind, definitions)
    schema: Raw = definitions.pop(kind.__name__)
    schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
    schema["required"] = ["name", *schema.get("required", [])]
    schema["title"] = name
    return schema


def _rewards_schema() -> Raw:
    from mmalign.rewardmodels import REWARDS

    number: Raw = {"type": "number"}
    by_iteration = {
        "type": "object",
        "minProperties": 1,
        "patternProperties": {r"^\d+$": number},
        "additionalProperties": False,
    }
    weight = {"anyOf": [number, by_iteration], "description": comments(RewardSettings)["weight"]}

    def one(settings: Raw, description: str, open_ended: bool = False) -> Raw:
        mapping = {"type": "object", "properties": {"weight": weight, **settings}}
        return {
            "description": description,
            "anyOf": [number, by_iteration, {**mapping, "additionalProperties": open_ended}],
        }

    known = {}
    for name, path in sorted(REWARDS.items()):
        kind = named_class(path)
        definitions: Raw = {}
        _schema_of(kind, definitions)
        known[name] = one(definitions[kind.__name__].get("properties", {}), first_sentence(kind))
    return {
        "description": "Each reward by name: a weight, or a mapping of weight and the reward's own settings.",
        "type": "object",
        "minProperties": 1,
        "properties": known,
        "patternProperties": {
            "[:/]": one({}, "A reward of your own, package.file:Class, or one of several, name/label", True)
        },
        "additionalProperties": False,
    }
