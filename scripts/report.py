"""`python scripts/report.py ...` is `lcsc report ...`."""

import sys

from lcsc.cli.main import main

sys.exit(main(["report", *sys.argv[1:]]))
