"""Let the library of a judge of edits evolve on a few labelled comparisons.

    python scripts/evolve_judge.py --comparisons edits.jsonl --out library.json \\
        --judge endpoint --model Qwen/Qwen2.5-VL-7B-Instruct --url http://localhost:8000/v1 \\
        --writer http://localhost:8001/v1 --writer-model Qwen/Qwen3-VL-235B-A22B-Instruct

A line of comparisons is {"prompt", "source", "candidates", "scores"}: an instruction, the picture before,
several edits of it (paths from the file), and what people think of each, higher being better. About a hundred
do. The library goes into a recipe as rewards.edit_harness.library; the steps are written beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from mmalign.rewardmodels.asking import open_client
from mmalign.rewardmodels.edit_harness import Library
from mmalign.rewardmodels.harness_evolution import Evolution, Evolver, Step, read_comparisons


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--comparisons", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the library")
    parser.add_argument("--start", type=Path, help="a library to begin with; without, an empty one")
    parser.add_argument("--judge", choices=("endpoint", "local"), default="endpoint")
    parser.add_argument("--model", required=True, help="of the judge: its name there, or a folder or hub id")
    parser.add_argument("--url", default="", help="of the judge's endpoint")
    parser.add_argument("--writer", required=True, help="address of the model that writes the library")
    parser.add_argument("--writer-model", required=True, help="its name there")
    parser.add_argument("--rounds", type=int, default=Evolution.rounds)
    parser.add_argument(
        "--tolerance", type=float, help="keep what costs no more accuracy (.075 in the paper); without: gains"
    )
    parser.add_argument("--seed", type=int, default=Evolution.seed)
    chosen = parser.parse_args()

    def log(step: Step) -> None:
        kept = "kept" if step.accepted else "left"
        print(
            f"round {step.round}, {step.what}: pairs {step.before:.3f} -> {step.after:.3f}, {kept}",
            flush=True,
        )

    try:
        how = Evolution(chosen.rounds, tolerance=chosen.tolerance, seed=chosen.seed)
        comparisons = read_comparisons(chosen.comparisons)
        start = Library.read(chosen.start) if chosen.start else Library()
        judge = open_client(chosen.judge, chosen.model, chosen.url, {})
        writer = open_client("endpoint", chosen.writer_model, chosen.writer, {})
        found = Evolver(judge, writer, comparisons, how).run(start, log)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    found.library.write(chosen.out)
    steps = [asdict(step) for step in found.steps]
    chosen.out.with_suffix(".steps.json").write_text(json.dumps(steps, indent=2) + "\n")
    print(
        f"set aside: pairs {found.first.pairs:.3f} -> {found.last.pairs:.3f}, whole comparisons "
        f"{found.first.groups:.3f} -> {found.last.groups:.3f}; {len(found.library.entries)} entries"
    )


if __name__ == "__main__":
    main()
