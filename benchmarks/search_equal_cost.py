"""What each searcher finds for the same cost: about 0.2 million image-forwards of trials on digits.

    python benchmarks/search_equal_cost.py --work scratch/ [--seeds 0 1 2] [--only NAME ...]

As `search_efficiency.py`: whole searches of the same banks, image-forwards counted alike, report seeds and report half.
Black-box searchers get 160 trials of 250 images (1 image-forward for each image and network call), descents 53 (3 for
each, their activations kept), so that their trials cost alike. `hybrid` and `ladder` choose how they share 53 trials.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from searches import by_contestant, contest, contest_arguments, write

BLACK_BOXES = "lcsc_evolution", "cma", "diagonal_cma", "de", "two_points_de", "pso", "one_plus_one", "tbpsa", "random"
IMAGES = ["search.num_images=250", "search.num_images_baselines=null"]
DESCENTS = "gradient", "lbfgs", "hybrid", "ladder"
TRIALS = {**dict.fromkeys(BLACK_BOXES, 160), **dict.fromkeys(DESCENTS, 53)}


def main() -> None:
    """Run what is missing, then write the table of what is finished."""
    args = contest_arguments(__doc__, ("digits", "mnist16"))
    known = {f"{n}_{t}": [f"searcher={n}", f"search.num_trials={t}", *IMAGES] for n, t in TRIALS.items()}
    rows = contest(known, args)
    to = args.to or Path(f"benchmarks/results/search_equal_cost_{args.experiment}.json")
    tables = {"contestants": known, "by_contestant": by_contestant(rows)}
    write(to, experiment=args.experiment, seeds=args.seeds, **tables, runs=rows)


if __name__ == "__main__":
    main()
