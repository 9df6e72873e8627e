#!/usr/bin/env bash
# Table and figure of docs/recycling_growth.md: about 17 minutes on one core. What is interrupted goes on when started
# again with the same FOLDER.
# Without --arms more ways to grow the last base follow.
#   scripts/reproduce/recycling_growth.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python benchmarks/recycling_growth.py --seeds 0 1 2 --arms stack "no noise" "top-k kept" "searched width" --folder "${1:-runs/recycling_growth}"
