"""Captions of a folder of pictures: python scripts/caption.py MODEL --images FOLDER --out captions.jsonl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
