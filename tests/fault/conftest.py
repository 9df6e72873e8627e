"""What the fault tests share: where they leave their counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.fixture
def count():
    """A function that files numbers under a name for docs/how_it_is_tested.md; see benchmarks/fault_counts.py.

    It does nothing unless `LCSC_FAULT_COUNTS` names a folder. Each name has a file of its own, for tests run side by
    side.
    """

    def file(name, **numbers):
        folder = os.environ.get("LCSC_FAULT_COUNTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.json").write_text(json.dumps(numbers))

    return file
