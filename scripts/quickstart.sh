#!/usr/bin/env bash
# Installs (into .venv) and runs the main job on the embedded CLIP and rendered data: no downloads of weights or data.
# Ends in a table of six methods with worst-group accuracy and the paths of the pictures.
#   bash scripts/quickstart.sh [OUTPUT (default output/quickstart)] [SEEDS (default "1")]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

out="${1:-output/quickstart}" seeds="${2:-1}"
config=configs/trainers/CoOpOOD/tiny_shapes.yaml

run() { # name, then the command line
  local name="$1"
  shift
  echo "Training $name ..."
  for seed in $seeds; do
    "$PY" train.py --config-file "$config" --seed "$seed" --output-dir "$out/$name/seed$seed" "$@" >/dev/null
  done
}

began=$SECONDS
run ZeroshotCLIP --trainer ZeroshotCLIP
run CoOp --trainer CoOp
run CoOpOOD --trainer CoOpOOD
run CoOpOOD-anchored --trainer CoOpOOD TRAINER.COOPOOD.ANCHOR attributes
run DebiasedPT --trainer DebiasedPT
run CoOpOOD+DebiasedPT --trainer CoOpOOD --config-file configs/trainers/CoOpOOD/debiased_tiny_shapes.yaml
"$PY" scripts/compare.py "$out" ZeroshotCLIP CoOp CoOpOOD CoOpOOD-anchored DebiasedPT CoOpOOD+DebiasedPT
echo
echo "Pictures of each run: $out/<method>/seed*/groups.png and, where something is trained, training.png; tables: results.md; everything printed: log.txt"
echo "Took $((SECONDS - began)) s after installation."
