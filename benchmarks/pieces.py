"""A seed measured piece by piece: each is saved when it is done, and the same line goes on with the next."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import circumstances

from lcsc.core.files import write_json

Pieces = Mapping[str, Callable[[], None]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a command line says about the pieces."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("codec_work"), help="folder of what lies between the pieces")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no piece after this time, exit with 3")
    parser.add_argument("--only", default="", help="beginnings of the pieces to measure, comma between them")
    parser.add_argument("--to", type=Path, required=True, help="results file")


def run_pieces(args: argparse.Namespace, pieces_of: Callable[[dict[str, Any]], Pieces], **about: Any) -> None:
    """Measure what the results file of `args.to` lacks, on one thread.

    Args:
        args: of `add_options`.
        pieces_of: the pieces of a seed by name, in order; each fills in its part of the row that is given.
        about: what a new row begins with. `done` holds the processor's seconds that each piece took.
    """
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    here = circumstances()
    results = json.loads(args.to.read_text()) if args.to.exists() else {**here, "seeds": []}
    if here["commit"] != results["commit"] and here["commit"] not in results.setdefault("later_commits", []):
        results["later_commits"].append(here["commit"])  # which pieces were measured with
    row = next((row for row in results["seeds"] if row["seed"] == args.seed), None)
    if row is None:
        row = {"seed": args.seed, "done": {}, **about}
        results["seeds"] = sorted([*results["seeds"], row], key=lambda row: row["seed"])
    started = time.perf_counter()
    for name, make in pieces_of(row).items():
        if name in row["done"] or not name.startswith(tuple(args.only.split(","))):
            continue
        if time.perf_counter() - started > args.seconds:
            sys.exit(3)  # the same line goes on
        began = time.process_time()
        make()
        row["done"][name] = time.process_time() - began
        write_json(args.to, results)
