"""What the tests of the report share: edits of run directories, and tables read back."""

from __future__ import annotations

import io
import json

import pandas as pd
from helpers_fake_run import framed

EVIL = "<script>alert(1)</script>"


def edit_records(path, change):
    records = [json.loads(line) for line in io.StringIO((path / "journal.jsonl").read_text(encoding="utf-8"))]
    (path / "journal.jsonl").write_bytes(framed([change(record) for record in records]))


def edit_geometry(path, geometry):
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8")) | {"geometry": geometry}
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def read_table(path):
    """A CSV file with floats that round-trip in every version of pandas."""
    frame = pd.read_csv(path, dtype=str)
    return frame.apply(lambda column: pd.to_numeric(column) if column.name in ("uid", "step") else as_floats(column))


def as_floats(column):
    try:
        return column.map(float, na_action="ignore").astype("float64")
    except ValueError:
        return column
