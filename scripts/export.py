"""`python scripts/export.py ...` is `lcsc export ...`."""

import sys

from lcsc.cli.main import main

sys.exit(main(["export", *sys.argv[1:]]))
