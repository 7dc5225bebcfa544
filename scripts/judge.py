"""How good a judge of captions is: python scripts/judge.py --judge lab --count 100"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
