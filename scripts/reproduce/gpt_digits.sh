#!/usr/bin/env bash
# Tables and figures of docs/generating_weights.md: about 45 minutes on one core. What is interrupted goes on when started
# again with the same FOLDER. CartPole needs the extra `rl`.
#   scripts/reproduce/gpt_digits.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
folder="${1:-runs/gpt_pieces}"
python benchmarks/gpt_digits.py --folder "$folder/digits" --to benchmarks/results/gpt_digits.json
python benchmarks/gpt_digits_figure.py benchmarks/results/gpt_digits.json docs/images/gpt_digits.svg
python benchmarks/gpt_mixed.py --folder "$folder/mixed" --to benchmarks/results/gpt_mixed.json
python benchmarks/gpt_cartpole.py --folder "$folder/cartpole" --to benchmarks/results/gpt_cartpole.json \
  --figure docs/images/gpt_cartpole.svg
lcsc search operator=generate_weights experiment=gpt_digits
