"""Search the yes-or-no question by which a frozen vision-language model finds artifacts best.

    python scripts/search_question.py --data runs/artifacts/train --model Qwen/Qwen2.5-VL-3B-Instruct \\
        --writer http://localhost:8000/v1 --writer-model Qwen/Qwen2.5-VL-7B-Instruct --pictures 200

Labels as of scripts/artifacts.py. The writer, a model behind a chat endpoint, criticizes and mends questions;
what is found goes into a recipe as rewards.artifact_question.question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from mmalign.rewardmodels.artifact_training import read_labeled
from mmalign.rewardmodels.endpoint import Endpoint
from mmalign.rewardmodels.question_search import EndpointWriter, ModelAsker, Search, search
from mmalign.rewardmodels.vlm_score import YesNo


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="that is asked; folder or hub id")
    parser.add_argument("--writer", required=True, help="address of an endpoint")
    parser.add_argument("--writer-model", required=True, help="its name there")
    parser.add_argument("--pictures", type=int, default=200, help="of the labeled ones (200)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    try:
        data = read_labeled(chosen.data)
        writer = EndpointWriter(Endpoint(chosen.writer, chosen.writer_model))
        asker = ModelAsker(YesNo("artifact_question", chosen.model, chosen.precision))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    rows = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(chosen.seed))
    rows = rows[: chosen.pictures]
    images = data.images[rows].float().to(chosen.device) / 255

    def log(number: int, beam: Sequence[tuple[float, str]]) -> None:
        print(f"round {number}: {beam[0][0]:.3f}  {beam[0][1]}", flush=True)

    settings = Search(rounds=chosen.rounds, beam=chosen.beam, seed=chosen.seed)
    found = search(asker, writer, images, data.artifact[rows].to(chosen.device), settings=settings, log=log)
    print(f"held out: {found.held_out:.3f}, the first question {found.first_held_out:.3f}\n{found.question}")


if __name__ == "__main__":
    main()
