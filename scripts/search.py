"""`python scripts/search.py ...` is `lcsc search ...`."""

import sys

from lcsc.cli.main import main

sys.exit(main(["search", *sys.argv[1:]]))
