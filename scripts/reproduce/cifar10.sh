#!/usr/bin/env bash
# CIFAR-10 in one command: detector, diffusion model, consistency model, a search of each, tables.
#
#   DATA=path/to/train.parquet scripts/reproduce/cifar10.sh
#
# DATA: a parquet file with a column of encoded 32x32 colour images and one of labels (needs pyarrow). Further settings:
#   OUT=cifar10      folder that everything is written into; the same line continues what was interrupted
#   PYTHON=python    a Python that lcsc is installed in
#   SEED=0           of the trainings and searches
#   INCEPTION=FILE   weights of Inception (weights-inception-2015-12-05-6726825d.pth, needs lcsc[fidelity]): final scores
#                    then hold plain FID beside that of the classifier, which is still what is searched
#   TINY=1           the whole chain at a size for tests, on any CPU; its scores mean nothing
#   EXPERIMENTS="cifar10 cifar10_consistency"  which of the two, in this order
#   TRAIN="..."      further words for the trainings, as trainer.num_steps=4000
#   SPEED="..."      how the trainings run; by default bfloat16, channels-last and compiled, which wants a recent GPU
# Made for one GPU of the H100 or H200 class and 20 minutes.
set -euo pipefail

DATA=${DATA:-${1:-}}
OUT=${OUT:-cifar10}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
EXPERIMENTS=${EXPERIMENTS:-cifar10 cifar10_consistency}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ ! -f $DATA ]]; then
    echo "cifar10.sh: DATA is \`$DATA\`, which is no file. Give the parquet file of CIFAR-10: DATA=train.parquet $0" >&2
    exit 2
fi
if [[ ${INCEPTION:-} && ! -f $INCEPTION ]]; then
    echo "cifar10.sh: INCEPTION is \`$INCEPTION\`, which is no file. Give Inception's weights file, or leave it out." >&2
    exit 2
fi

if [[ ${TINY:-} ]]; then
    SPEED=${SPEED-}
    data=(dataset.resize=8)
    detector=(num_steps=60 batch_size=16 widths=4,8,8 num_features=8)
    train=(
        trainer.num_steps=8 trainer.batch_size=4 trainer.save_every=2
        "network.config.block_out_channels=[8,8]" network.config.norm_num_groups=4 network.config.layers_per_block=1
        network.config.attention_head_dim=8
        "network.config.down_block_types=[DownBlock2D,AttnDownBlock2D]"
        "network.config.up_block_types=[AttnUpBlock2D,UpBlock2D]"
    )
    search=(
        search.num_trials=3 search.num_images=12 search.num_finalists=2 search.num_images_select=12
        search.num_images_report=16
    )
else
    SPEED=${SPEED-trainer.mixed_precision=bf16 trainer.channels_last=true trainer.compile=inductor}
    data=()
    detector=(num_steps=3000 batch_size=512 widths=64,128,256 flip=true)
    train=()
    search=()
fi
read -ra speed <<<"$SPEED"
read -ra more <<<"${TRAIN:-}"
train+=("${more[@]}")
data+=("dataset.path=$DATA")
if [[ ${INCEPTION:-} ]]; then
    kid='{name: kid_classifier, weights_path: ${metric.weights_path}, weights_digest: ${metric.weights_digest}}'
    search+=("other_metrics=[$kid,{name: fid, weights_path: '$INCEPTION'}]")
fi

weights=$OUT/detector.safetensors
if [[ ! -f $weights ]]; then
    "$PYTHON" "$HERE/../train_detector.py" dataset=parquet "${data[@]}" "seed=$SEED" "${detector[@]}" "to=$weights"
fi

for experiment in $EXPERIMENTS; do
    settings=(
        "experiment=$experiment" "seed=$SEED" "${data[@]}" "metric.weights_path=$weights"
        "bank.path=$OUT/banks/$experiment" "runs_dir=$OUT/runs" "${train[@]}" "${speed[@]}" "${search[@]}"
    )
    "$PYTHON" -m lcsc train "${settings[@]}"
    "$PYTHON" -m lcsc search "${settings[@]}"
done
"$PYTHON" -m lcsc report "runs=$OUT/runs/*" "to=$OUT/comparison"
