"""Where the time of an iteration goes: python scripts/benchmark.py --recipe lab_flow_grpo"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
