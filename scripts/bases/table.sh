#!/usr/bin/env bash
# The table of prompt learners in docs/results.md, each alone and under the anchored CoOpOOD, on ShapesOnScenes with the embedded
# CLIP; mean and standard deviation over seeds.
#   bash scripts/bases/table.sh [SEEDS (default "1 2 3")] [OUTPUT (default output/bases_table)] [RUNS AT A TIME (default 1)]
# Runs that are finished are not trained again. About 1.5 CPU hours in all, most of it for the last four rows.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/environment.sh

seeds="${1:-1 2 3}"
out="${2:-output/bases_table}"
at_a_time="${3:-1}"
config=configs/trainers/CoOpOOD/tiny_shapes.yaml
names=()

train() { # output folder, then the command line
  local folder="$1"
  shift
  [ -f "$folder/results.json" ] && return
  echo "Training $folder ..."
  "$PY" train.py --config-file "$config" --output-dir "$folder" "$@" TRAIN.VAL_FREQ 0 >/dev/null
}

row() { # prompt learner, then its keys: alone, and under the anchored CoOpOOD
  local base="$1" seed
  shift
  names+=("$base" "$base+CoOpOOD")
  for seed in $seeds; do
    while [ "$(jobs -rp | wc -l)" -ge "$at_a_time" ]; do wait -n; done
    (
      train "$out/$base/seed$seed" --seed "$seed" --trainer "$base" "$@"
      train "$out/$base+CoOpOOD/seed$seed" --seed "$seed" --trainer CoOpOOD --base "$base" "$@" TRAINER.COOPOOD.ANCHOR attributes
    ) &
  done
}

# The optimiser is the config's in every row. Bases that train the image tower stop after 20 epochs: MaPLe's accuracy
# on validation data is flat from the tenth on, and a step costs them thirty times as much.
tower=(OPTIM.MAX_EPOCH 20)
row ZeroshotCLIP
row LinearProbe
row CoOp
row CoCoOp TRAINER.COCOOP.CTX_INIT "a photo of a"
row KgCoOp TRAINER.COOP.W 8.0
row ProGrad
row VPT "${tower[@]}"
row IVLP "${tower[@]}"
row MaPLe "${tower[@]}"
row PromptSRC "${tower[@]}"
wait
"$PY" scripts/compare.py "$out" "${names[@]}"
