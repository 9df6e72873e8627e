#!/usr/bin/env bash
# Coded checkpoints: the four results files and the figure of docs/codec.md.
#
#   scripts/reproduce/codec.sh --text FILE
#
# About 25 minutes on one core, and the bank of experiment=digits for each seed beside it. Further settings:
#   OUT=codec          folder of states, banks and results; the same line continues what was interrupted
#   PYTHON=python      a Python that lcsc is installed in, with lz4 and zipnn beside it for the comparison
#   SEEDS="0 1 2"      seeds
#   TINY=1             one seed of everything at a size that tries the commands out; its numbers mean nothing
# Any further words go to the language model's benchmark, as --text FILE.
set -euo pipefail

OUT=${OUT:-codec}
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-0 1 2}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../benchmarks" && pwd)
mkdir -p "$OUT"
LM=() NEURAL=() BANK=(--trials 20) FRONT=() TRAIN=()
if [[ ${TINY:-} ]]; then
    SEEDS=0
    LM=(--steps 8 --after 0,1)
    NEURAL=(--steps 8)
    BANK=(--trials 2 --images 64)
    FRONT=(--trials 12 --groups 2 --steps 100 --after 0,1 --images 32)
    TRAIN=(trainer.num_steps=12 trainer.save_every=2 "network.config.block_out_channels=[8,8,8]"
        network.config.norm_num_groups=4)
fi
for seed in $SEEDS; do
    "$PYTHON" "$HERE/codec.py" lm --seed "$seed" "${LM[@]}" --work "$OUT" --to "$OUT/codec_lm.json" "$@"
    "$PYTHON" "$HERE/codec_neural.py" --seed "$seed" "${NEURAL[@]}" --work "$OUT" --to "$OUT/codec_neural.json" "$@"
    bank="$OUT/digits-$seed"
    [[ -e "$bank.done" ]] || "$PYTHON" -m lcsc train experiment=digits seed="$seed" "${TRAIN[@]}" bank.path="$bank"
    touch "$bank.done"
    "$PYTHON" "$HERE/codec.py" bank --seed "$seed" --bank "$bank" "${BANK[@]}" --work "$OUT" --to "$OUT/codec_digits.json"
    "$PYTHON" "$HERE/codec_front.py" --seed "$seed" "${FRONT[@]}" --work "$OUT" --to "$OUT/codec_front.json"
done
"$PYTHON" "$HERE/codec_front.py" --draw "$OUT/codec_front.png" --to "$OUT/codec_front.json"
