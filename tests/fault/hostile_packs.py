"""Packed banks whose description lies, one edit of a good one each."""

from __future__ import annotations

import json
import struct

#: rows, and float32 columns of a row
ROWS, COLUMNS = 2, 1024
GOOD = {
    "version": 1,
    "dtype": "float32",
    "tensors": [["v", [2, 3]], ["w", [4]]],
    "ties": {"u": "w"},
    "constants": [["n", "int64", [2], 40], ["m.running_var", "float32", [3], 56]],
    "arch": {"class": "Net", "config": {"width": 3}},
    "kind": "ema",
    "rate": "0.9",
    "parents": [{"step": 1, "files": {"a": 9}, "content": "0" * 64}, {"step": 2, "files": {}, "content": "1" * 64}],
}


def packed(description: object, *, rows: dict | None = None, columns: int = COLUMNS, count: int = ROWS) -> bytes:
    """A file with this description (a value or its text)."""
    text = description if isinstance(description, str) else json.dumps(description)
    size = count * columns * 4
    matrix = {"rows": {"dtype": "F32", "shape": [count, columns], "data_offsets": [0, size]}}
    header = json.dumps({"__metadata__": {"lcsc_bank": text}, **(matrix if rows is None else rows)}).encode()
    header += b" " * (-(8 + len(header)) % 4096)
    return struct.pack("<Q", len(header)) + header + bytes(size)


def parents(**edit: object) -> dict:
    return GOOD | {"parents": [parent | edit for parent in GOOD["parents"]]}


def packs() -> dict[str, bytes]:
    """Lies of every kind: JSON, types, counts, places, names."""
    flat, entry = ROWS * COLUMNS, {"dtype": "F32", "data_offsets": [0, ROWS * COLUMNS * 4]}
    constant = ["n", "int64", [2], 40]
    edits: dict[str, object] = {
        "empty": "",
        "not-json": "{version}",
        "list": "[]",
        "deep-lists": "[" * 50_000,
        "deep-objects": '{"version":' + '{"a":' * 50_000,
        "twice": '{"version":1,"version":1}',
        "lists-10^6": '{"version":[' + "[]," * 1_000_000 + "[]]}",
        "numbers-10^6": '{"version":[' + "1," * 3_000_000 + "1]}",
        "no-fields": {},
        "more-fields": GOOD | {"more": 1},
        "parents-missing": {key: value for key, value in GOOD.items() if key != "parents"},
        "ties-equal-steps": parents(step=1),
        "steps-decrease": GOOD | {"parents": GOOD["parents"][::-1]},
        "one-parent": GOOD | {"parents": GOOD["parents"][:1]},
        "parent-more": parents(path="/etc/passwd"),
        "parent-list": GOOD | {"parents": [[1, 2], [2, 3]]},
        "tensor-twice": GOOD | {"tensors": [["w", [4]], ["w", [4]]]},
        "tensor-text": GOOD | {"tensors": [["w", "abcd"]]},
        "tensor-number": GOOD | {"tensors": [[5, [4]]]},
        "tensor-many": GOOD | {"tensors": [[f"w{i}", []] for i in range(40_000)], "ties": {}},
        "statistics": GOOD | {"tensors": [*GOOD["tensors"], ["m.running_mean", [4]]]},
        "tie-to-itself": GOOD | {"ties": {"w": "w"}},
        "tie-to-nothing": GOOD | {"ties": {"u": "x"}},
        "tie-to-a-tie": GOOD | {"ties": {"u": "w", "t": "u"}},
        "rates-of-raw": GOOD | {"kind": "raw", "rates": ["a", "b"]},
        "rates-few": GOOD | {"rates": ["a"]},
        "rates-one": GOOD | {"rates": ["a", "a"]},
        "rates-number": GOOD | {"rates": [0.9, 0.99]},
        "constant-combined": GOOD | {"constants": [["n", "float32", [2], 40]]},
        "constant-twice": GOOD | {"constants": [constant, ["n", "int64", [2], 56]]},
        "constant-is-tensor": GOOD | {"constants": [["w", "int64", [2], 40]]},
        "constant-short": GOOD | {"constants": [constant[:3]]},
        "constants-overlap": GOOD | {"constants": [constant, ["k", "int64", [2], 48]]},
        "ansi": GOOD | {"constants": [["\x1b[2J`", "\x1b[31m", [1], 40]]},
    }
    for field, odd in {
        "version": (0, 7, 1.0, True, None, "1", [1]),
        "dtype": ("bfloat16", "float64", "F32", None, ["float32"], {}),
        "tensors": ([], {}, None, 7, "w", [["w"]], [["w", [4], 1]], [[["w"], [4]]]),
        "ties": ([], None, "u", {"u": None}, {"u": ["w"]}),
        "constants": ({}, None, "n", [None], [[]], ["n"]),
        "arch": ([], "Net", {}, {"class": "Net"}, {"class": 1, "config": {}}, {"class": "Net", "config": []}, False),
        "kind": ("lora", "", None, ["raw"], 1),
        "rate": ([1], 0.9, True, {}),
        "parents": ([], {}, None, "ab", [None, None]),
        "rates": ({}, None, "ab", 2),
    }.items():
        edits |= {f"{field}-{k}": GOOD | {field: value} for k, value in enumerate(odd)}
    shapes = (
        [-4],
        [-2, -2],
        [2.5],
        [True],
        ["4"],
        [None],
        [1 << 62, 4],
        [10**30],
        [[4]],
        None,
        4,
        {},
        [1025],
        [1] * 65,
    )
    for k, shape in enumerate(shapes):
        edits[f"shape-{k}"] = GOOD | {"tensors": [["w", shape]]}
        edits[f"constant-shape-{k}"] = GOOD | {"constants": [["n", "int64", shape, 40]]}
    for k, at in enumerate((-100_000, -1, 0, 39, 4090, 1 << 63, 10**30, 40.0, True, None, "40", [40])):
        edits[f"at-{k}"] = GOOD | {"constants": [["n", "int64", [2], at]]}
    for k, dtype in enumerate(("zz", "", None, 1, ["int64"], "F32")):
        edits[f"constant-dtype-{k}"] = GOOD | {"constants": [["n", dtype, [2], 40]]}
    for field, odd in {
        "step": (-1, 1.0, True, None, "1", 1 << 63),
        "files": ([1], None, "a", {"a": -1}, {"a": 1.5}, {"a": True}, {"a": "1"}),
        "content": (7, None, "", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n"),
        "rounded": (None, 7, "", "int8", ["bfloat16"], "bfloat16,float16"),
    }.items():
        edits |= {f"parent-{field}-{k}": parents(**{field: value}) for k, value in enumerate(odd)}
    files = {name: packed(value) for name, value in edits.items()}
    others: dict[str, dict] = {
        "no-rows": {},
        "rows-flat": {"rows": entry | {"shape": [flat]}},
        "rows-cube": {"rows": entry | {"shape": [ROWS, 2, COLUMNS // 2]}},
        "rows-integers": {"rows": entry | {"shape": [ROWS, COLUMNS], "dtype": "I32"}},
        "rows-narrow": {"rows": entry | {"shape": [flat // 8, 8]}},
        "rows-named-otherwise": {"row": entry | {"shape": [ROWS, COLUMNS]}},
    }
    files |= {name: packed(GOOD, rows=rows) for name, rows in others.items()}
    files["no-columns"] = packed(GOOD, columns=0)
    return files | {"truncated": packed(GOOD)[:-1], "bytes-behind": packed(GOOD) + b"x"}
