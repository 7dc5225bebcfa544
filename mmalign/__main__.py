"""`python -m mmalign` is the command `mmalign`."""

import sys

from mmalign.cli import main

sys.exit(main())
