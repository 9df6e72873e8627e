#!/usr/bin/env bash
# Tables and figures of docs/recycling_warm_start.md on a text of your own (they are of Shakespeare's works, 1.1 MB): about
# 30 minutes on one core. What is interrupted goes on when started again with the same FOLDER.
#   scripts/reproduce/seq2seq.sh TEXT [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
folder=${2:-runs/seq2seq}
python benchmarks/seq2seq_combinations.py --seeds 0 1 2 --text "$1" --folder "$folder/combinations"
python benchmarks/seq2seq_layers.py --seeds 0 1 2 --text "$1" --folder "$folder/layers"
