"""Questions turned around, for answers of several choices (TW-GRPO, arXiv:2505.24718).

python scripts/invert_questions.py questions.jsonl inverted.jsonl

A line is {"question" (or "prompt"), "choices", "answer" or "answers", ...}; the image and all else is kept.
Lines whose question has no auxiliary verb, or no wrong choice, are left out and counted.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.rewardmodels.questions import Question, ask, inverted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of which wrong choices stay")
    options = parser.parse_args()
    written, lines = [], options.source.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        question = Question.read({"question": row.get("prompt"), **row})
        other = inverted(question, random.Random(f"{options.seed} {number}"))
        if other is None:
            continue
        row.pop("answer", None)
        row |= {
            "prompt": ask(other.question, other.choices),
            "question": other.question,
            "choices": other.choices,
            "answers": other.answers,
        }
        written.append(json.dumps(row, ensure_ascii=False) + "\n")
    options.out.write_text("".join(written), encoding="utf-8")
    print(f"{options.out}: {len(written)} questions, {len(lines) - len(written)} left out")


if __name__ == "__main__":
    main()
