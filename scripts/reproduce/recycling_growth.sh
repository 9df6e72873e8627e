#!/usr/bin/env bash
# Table and figure of docs/recycling_growth.md: about 20 minutes on one core. What is interrupted goes on when started
# again with the same FOLDER.
#   scripts/reproduce/recycling_growth.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python benchmarks/recycling_growth.py --seeds 0 1 2 --folder "${1:-runs/recycling_growth}"
