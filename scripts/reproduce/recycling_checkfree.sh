#!/usr/bin/env bash
# Table and figure of docs/recycling_checkfree.md: about 25 minutes on one core. What is interrupted goes on when started
# again with the same FOLDER.
#   scripts/reproduce/recycling_checkfree.sh [FOLDER]
# PYTHON=python: a Python that lcsc is installed in
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python} FOLDER=${1:-runs/recycling_checkfree}
results=benchmarks/results
"$PYTHON" benchmarks/recycling_pipeline.py --to $results/recycling_pipeline.json
"$PYTHON" benchmarks/recycling_checkfree.py --seeds 0 1 2 --folder "$FOLDER" --to $results/recycling_checkfree.json
"$PYTHON" benchmarks/recycling_checkfree_report.py $results/recycling_checkfree.json \
    docs/images/recycling_checkfree.png docs/recycling_checkfree.md
