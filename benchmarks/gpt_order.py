"""Why one order of the hidden units for a whole run does not help: it cannot be told from where the run begins.

    python benchmarks/gpt_order.py --to benchmarks/results/gpt_order.json

Runs of 8 hidden units with initial weights of their own. Every run's units are brought into the order in which its
last checkpoint is nearest to a reference (a linear assignment), and all its checkpoints into the same order. The
reference is the mean of the last checkpoints so ordered, in `PASSES` passes from the first run's. A generator that
starts from a checkpoint has to find that order without the last one: the nearest to the mean of its step's ordered
checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpt_digits import MANY
from machine import circumstances, mean_se

from lcsc.datasets.digits import Digits
from lcsc.models.many_classifiers import Many
from lcsc.recycling.neurons import aligning, hidden_layers
from lcsc.training.parameter_dit import ParameterDiTTrainer
from lcsc.training.weight_runs import make_runs, parts_of

RUNS, PASSES = 500, 5


def measured(seed: int) -> dict:
    """Spread of the last checkpoints with and without the order, and how much of it is known at each saved step."""
    many = Many({"class": "SmallClassifier", "config": {"hidden": [8]}})
    parts = parts_of(Digits(), many)
    settings = replace(ParameterDiTTrainer(**MANY).run_settings, num_runs=RUNS, batch_size=64)
    runs = make_runs(settings, many, parts, seed)
    theta_RKP, (layer,) = runs.theta_RKP.double().numpy(), hidden_layers(runs.shapes)
    ends_RP = theta_RKP[:, -1]
    reference_P = ends_RP[0]
    for _ in range(PASSES):
        places_RP = aligning((layer,), ends_RP, reference_P)
        ordered_RP = np.take_along_axis(ends_RP, places_RP, 1)
        reference_P = ordered_RP.mean(0)

    def loss(theta_P: np.ndarray) -> float:
        return float(many.metrics(torch.from_numpy(theta_P[None]).float(), parts.x[1], parts.labels[1])["loss"])

    own_U = layer.own_UE[:, 0]
    known = {}
    for k, step in enumerate(runs.steps_RK[0].tolist()):
        mean_P = np.take_along_axis(theta_RKP[:, k], places_RP, 1).mean(0)
        found_RP = aligning((layer,), theta_RKP[:, k], mean_P)
        known[str(step)] = float((found_RP[:, own_U] == places_RP[:, own_U]).mean())
    return {
        "seed": seed,
        "loss_of_the_ends": float(runs.metric("loss")[:, -1].mean()),
        "spread_of_the_ends": float(np.linalg.norm(ends_RP - ends_RP.mean(0), axis=1).mean()),
        "spread_in_order": float(np.linalg.norm(ordered_RP - reference_P, axis=1).mean()),
        "loss_of_their_mean": loss(ends_RP.mean(0)),
        "loss_of_their_mean_in_order": loss(reference_P),
        "units_in_place": known,
    }


def main() -> None:
    """All seeds, and the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(seed) for seed in args.seeds]
    table = {key: mean_se([row[key] for row in rows]) for key in rows[0] if key not in ("seed", "units_in_place")}
    table["units_in_place"] = {
        step: mean_se([row["units_in_place"][step] for row in rows]) for step in rows[0]["units_in_place"]
    }
    print(json.dumps(table, indent=1))
    args.to.write_text(json.dumps({**circumstances(), "table": table, "seeds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
