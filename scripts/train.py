"""`python scripts/train.py ...` is `lcsc train ...`."""

import sys

from lcsc.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
