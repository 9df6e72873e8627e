"""`lcsc status`: how far runs have come."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lcsc.report.status import Status, open_runs, status_text
from lcsc.search.lock import BEAT


def main(words: Sequence[str]) -> None:
    """`RUN...`: run directories, finished or not."""
    looks = [Status(run) for run in open_runs(words)]
    for look in looks:
        look.rows()  # notes where the counters stand
    if any(look.unsure for look in looks):
        time.sleep(BEAT + 1)  # a driver elsewhere is known by its counter alone
    print("\n\n".join(status_text(look.run, look.rows()) for look in looks), flush=True)
