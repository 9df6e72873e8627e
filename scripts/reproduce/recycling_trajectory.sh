#!/usr/bin/env bash
# Table and figure of docs/objectives.md, LCSC of a language model's own checkpoints.
# What is interrupted goes on when started again with the same FOLDER.
#   scripts/reproduce/recycling_trajectory.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
python benchmarks/recycling_trajectory.py --seeds 0 1 2 --folder "${1:-runs/recycling_trajectory}" \
    --figure docs/images/recycling_trajectory.png
