#!/usr/bin/env bash
# Table and figure of docs/music.md, on tunes of your own in ABC notation: about 20 minutes on one core for the thousand
# of the Nottingham Music Database. What is interrupted goes on when started again with the same FOLDER.
#   scripts/reproduce/music_text_to_music.sh TUNES [FOLDER]
# PYTHON=python: a Python that lcsc[music] is installed in
set -euo pipefail
TUNES=$(realpath "${1:?give a folder of tunes in ABC notation}")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python} FOLDER=${2:-runs/music_text_to_music}
results=benchmarks/results/music_text_to_music.json
"$PYTHON" benchmarks/music_text_to_music.py --tunes "$TUNES" --work "$FOLDER" --to $results
"$PYTHON" benchmarks/music_report.py $results docs/images/music_text_to_music.png
