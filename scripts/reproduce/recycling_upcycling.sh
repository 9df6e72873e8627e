#!/usr/bin/env bash
# Table and figure of docs/recycling_upcycling.md: about 8 minutes on one core. What is interrupted goes on when started
# again with the same FOLDER. TEXT is a text file; the results in benchmarks/ are those of tiny Shakespeare (1.1 MB), and
# without one the text is that of dataset=text.
# Without --arms more mixtures follow, and a search over noise, new units and number of experts.
#   scripts/reproduce/recycling_upcycling.sh [FOLDER] [TEXT]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python benchmarks/recycling_upcycling.py --seeds 0 1 2 --arms all alternate searched --folder "${1:-runs/recycling_upcycling}" ${2:+--text "$2"}
