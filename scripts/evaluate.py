"""Score a run, a checkpoint, a model or a folder of images: python scripts/evaluate.py runs/quickstart"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
