"""Serve rewards over HTTP: python scripts/serve_rewards.py lab jpeg_compressibility --port 8100"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve-rewards", *sys.argv[1:]]))
