"""What the base model reaches by drawing more: python scripts/best_of_n.py runs/quickstart"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["best-of-n", *sys.argv[1:]]))
