#!/usr/bin/env bash
# Table and figure of docs/generating_weights.md: about 25 minutes on one core, and the searches there. What is
# interrupted goes on when started again with the same FOLDER.
#   scripts/reproduce/gpt_digits.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python benchmarks/gpt_digits.py --folder "${1:-runs/gpt_digits_pieces}" --to benchmarks/results/gpt_digits.json
python benchmarks/gpt_digits_figure.py benchmarks/results/gpt_digits.json docs/images/gpt_digits.svg
lcsc search operator=generate_weights experiment=gpt_digits
lcsc search experiment=gpt_digits_mixed
