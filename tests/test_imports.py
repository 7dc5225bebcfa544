"""Who may import whom (docs/architecture.md): a rule with a test needs no reviewer."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where runs are put together out of their parts.
EDGE = (
    r"mmalign\.(captioning|assembly|judging|planning|question_filter|subjects|config|cli|experiments|results"
    r"|best_of_n|descore_training)"
)
DRAWS = r"mmalign\.(pipelines\b.*|testing|lab\.pretrain\w*)"
REWARDS = r"mmalign\.rewardmodels\b.*"

# What is imported -> by which modules alone, and why.
ONLY_BY = {
    r"accelerate": (r"mmalign\.distributed", "processes are for distributed.py"),
    r"tensorboard|wandb|torch\.utils\.tensorboard": (
        r"mmalign\.tracking",
        "trackers are for tracking.py",
    ),
    r"fastapi|uvicorn": (r"mmalign\.serving", "the server is for serving.py"),
    r"httpx": (rf"mmalign\.pipelines\.rollout_server|{REWARDS}", "servers are asked by rewards and rollouts"),
    r"msgpack": (rf"mmalign\.wire|{REWARDS}", "bytes are for wire.py"),
    r"diffusers": (
        rf"{DRAWS}|mmalign\.rewardmodels\.latent_identity",  # which is blocks of a denoiser
        "models that draw are for pipelines/",
    ),
    r"peft": (DRAWS, "models that draw are for pipelines/"),
    r"transformers": (f"{DRAWS}|{REWARDS}", "models are for pipelines/ and rewardmodels/"),
    r"timm|open_clip|torchvision": (REWARDS, "models that judge are for rewardmodels/"),
    r"mmalign\.pipelines": (
        rf"mmalign\.(pipelines\b.*|benchmark)|{EDGE}",
        "the core meets policies as objects",
    ),
    r"mmalign\.rewardmodels": (f"{REWARDS}|{EDGE}", "the core meets rewards as objects"),
    r"mmalign\.algorithms": (EDGE, "methods do not know each other, and the loop knows none"),
    r"mmalign\.lab": (r"mmalign\.(lab\b.*|rewardmodels\.lab\w*)", "the core does not know the lab"),
    EDGE: (rf"{EDGE}|mmalign\.(benchmark|__main__)", "what puts a run together is imported by nobody inside"),
    r"pipelines|rewardmodels": (
        r"nobody",
        "write mmalign.pipelines: one module, one name",
    ),
}

# Modules -> all that they may import of this project, and why.
ONLY_FROM = {
    r"mmalign\.(records|copies|randomness|pictures)": (r"nothing", "it is the innermost"),
    r"mmalign\.(sde|solvers)": (r"mmalign\.(records|sde)", "it is arithmetic"),
    r"mmalign\.distances": (r"mmalign\.randomness", "it is arithmetic"),
    r"mmalign\.(verdicts|wire)": (r"mmalign\.(contracts|records)", "it is what records are sent as"),
    r"mmalign\.contracts": (r"mmalign\.(copies|records)", "contracts speak of records"),
    r"mmalign\.(composition|compositions)": (
        r"mmalign\.(composition|contracts|credit|records|updates)",
        "what becomes of rewards knows the credit, not the loop",
    ),
    r"mmalign\.(credit|gradients|objectives|plans|updates)": (
        r"mmalign\.(contracts|copies|randomness|records|sde)",
        "a method's parts know the contracts, not the loop",
    ),
    r"mmalign\.rollout": (
        r"mmalign\.(contracts|randomness|records|sde|solvers)",
        "it follows a plan, whatever the network",
    ),
    r"mmalign\.(coupling|forward_process|pairwise)": (
        r"mmalign\.(contracts|copies|coupling|credit|objectives|randomness|records|sde)",
        "what methods share knows the contracts, not the loop",
    ),
    r"mmalign\.pipelines\b.*": (
        r"mmalign\.(pipelines\b.*|contracts|copies|pictures|randomness|records|rollout|sde)",
        "a pipeline knows no reward, no credit and no loop",
    ),
    r"mmalign\.rewardmodels\b.*": (
        r"mmalign\.(rewardmodels\b.*|claim_rewards|claims|contracts|pictures|records|verdicts|wire|lab\b.*)",
        "a reward sees outcomes and nothing else",
    ),
    r"mmalign\.lab\b.*": (r"mmalign\.(lab\b.*|randomness)", "the lab stands alone"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] not in ("pipelines", "rewardmodels") else ("mmalign", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) for every import of a file, relative ones and `import_module("literal")` resolved."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def broken(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None."""
    for whom, (who, why) in ONLY_BY.items():
        if re.match(rf"(?:{whom})(?:\.|$)", name) and not re.fullmatch(who, module):
            return why
    for who, (whom, why) in ONLY_FROM.items():
        ours = name.startswith("mmalign.")
        if ours and re.fullmatch(who, module) and not re.match(rf"(?:{whom})(?:\.|$)", name):
            return why
    return None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    return [
        f"{line}: {module} imports {name}: {why}"
        for line, name in imports(source, module, is_package)
        if (why := broken(module, name))
    ]


def test_imports_point_inward():
    wrong = [
        f"{path.relative_to(ROOT)}:{violation}"
        for folder in ("mmalign", "pipelines", "rewardmodels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for violation in violations(path.read_text(), module_of(path), path.name == "__init__.py")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_that_the_design_names_are_there():
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text())
    places = [ROOT, *(ROOT / folder for folder in ("mmalign", "pipelines", "rewardmodels"))]
    assert len(named) > 20
    assert [name for name in named if not any((place / name).is_file() for place in places)] == []


def test_the_two_outer_folders_have_one_name_each():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: import mmalign.{name}"
        for folder in ("scripts", "tests", "docs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path.read_text(), module_of(path))
        if name.split(".")[0] in ("pipelines", "rewardmodels")
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmalign.trainer", "from mmalign.algorithms import ALGORITHMS"),
        ("mmalign.algorithms.flow_grpo_fast", "from mmalign.algorithms.flow_grpo import FlowGRPO"),
        ("mmalign.algorithms.flow_grpo_fast", "from .flow_grpo import FlowGRPO"),
        ("mmalign.trainer", "from mmalign import rewardmodels"),
        ("mmalign.trainer", "def late():\n    import mmalign.pipelines.sd3"),
        ("mmalign.evaluation", "import importlib\nimportlib.import_module('mmalign.rewardmodels.lab')"),
        ("mmalign.trainer", "from accelerate import Accelerator"),
        ("mmalign.trainer", "from torch.utils import tensorboard"),
        ("mmalign.sde", "import diffusers.schedulers"),
        ("mmalign.credit", "from mmalign.trainer import Trainer"),
        ("mmalign.contracts", "from mmalign.scoring import Scorer"),
        ("mmalign.scoring", "from mmalign.lab.verifier import score"),
        ("mmalign.learning", "from mmalign.config import RunConfig"),
        ("mmalign.rewardmodels.jpeg", "from mmalign.scoring import Scorer"),
        ("mmalign.rewardmodels.jpeg", "from mmalign.pipelines import load"),
        ("mmalign.rewardmodels.conse", "from mmalign.lab.grammar import parse"),
        ("mmalign.pipelines.sd3", "from mmalign.credit import Credit"),
        ("mmalign.pipelines.sd3", "import timm"),
        ("mmalign.cli", "import rewardmodels"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    (found,) = violations(source, module)
    assert found.startswith(f"{len(source.splitlines())}: {module} imports ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmalign.assembly", "from mmalign.rewardmodels import load"),
        ("mmalign.rewardmodels.lab", "from mmalign.lab.verifier import score"),
        ("mmalign.rewardmodels.conse", "from transformers import AutoModel\nimport torchvision"),
        ("mmalign.lab.pretrain_flow", "from diffusers import SD3Transformer2DModel"),
        ("mmalign.trainer", "import accelerated\nfrom torch.utils import data"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert not violations(source, module)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules outside of the standard library that a fresh interpreter loads for a statement."""
    code = (
        f"import sys; before = set(sys.modules)\n{statement}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split()) - set(sys.stdlib_module_names)


def test_importing_mmalign_loads_nothing_else():
    assert loaded_by("import mmalign") == {"mmalign"}


@pytest.mark.slow
def test_looking_at_the_tables_loads_no_model_library():
    statement = (
        "from importlib import import_module\n"
        "from mmalign.rewardmodels import REWARDS\n"
        "import mmalign.algorithms\n"
        "for path in REWARDS.values(): import_module(path.partition(':')[0])"
    )
    heavy = {"accelerate", "diffusers", "open_clip", "peft", "timm", "torchvision", "transformers"}
    assert not heavy & loaded_by(statement)
