#!/usr/bin/env bash
# Grouped-query attention from a multi-head model, three seeds: results file and figure of docs/recycling.md.
#
#   scripts/reproduce/recycling_gqa.sh
#
# About 25 minutes on one core. Further settings:
#   OUT=recycling_gqa  folder of models and runs; the same line continues what was interrupted
#   PYTHON=python      a Python that lcsc is installed in
#   TINY=1             the whole chain at a size for tests; its losses mean nothing
# Any further words go to the benchmark, as --text FILE or --width 256.
set -euo pipefail

OUT=${OUT:-recycling_gqa}
PYTHON=${PYTHON:-python}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
size=()
if [[ ${TINY:-} ]]; then
    size=(--steps 20 --width 32 --layers 2 --blocks 8 --texts 2 --context 64)
fi
mkdir -p "$OUT"
"$PYTHON" "$HERE/../../benchmarks/recycling_gqa.py" --folder "$OUT" --to "$OUT/recycling_gqa.json" \
    --figure "$OUT/recycling_gqa.png" "${size[@]}" "$@"
