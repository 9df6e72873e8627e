"""`python -m lcsc` is `lcsc`."""

from lcsc.cli.main import main_exit

main_exit()
