#!/usr/bin/env bash
# The first table of docs/results.md: six methods on ShapesOnScenes with the embedded CLIP, mean and standard deviation over seeds.
#   bash scripts/coop_ood/table.sh [SEEDS (default "1 2 3 4 5")] [OUTPUT (default output/coop_ood_table)]
# Runs that are finished are not trained again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/environment.sh

seeds="${1:-1 2 3 4 5}"
out="${2:-output/coop_ood_table}"
config=configs/trainers/CoOpOOD/tiny_shapes.yaml

run() { # name, then the command line
  local name="$1" seed
  shift
  for seed in $seeds; do
    [ -f "$out/$name/seed$seed/results.json" ] && continue
    echo "Training $name, seed $seed ..."
    "$PY" train.py --config-file "$config" --seed "$seed" --output-dir "$out/$name/seed$seed" "$@" >/dev/null
  done
}

# Hyper-parameters: docs/sweeps/coop_ood.md, chosen on validation data. Those of CoOpOOD, plain and anchored, are the defaults.
joint=(TRAINER.COOPOOD.PHASES joint TRAINER.COOPOOD.LR 1e-4)
run ZeroshotCLIP --trainer ZeroshotCLIP
run CoOp --trainer CoOp
run CoOp+linear --trainer CoOpOOD "${joint[@]}" TRAINER.COOPOOD.ALPHA 0 TRAINER.COOPOOD.BETA 0
run L_s-only --trainer CoOpOOD "${joint[@]}" TRAINER.COOPOOD.ALPHA 1 TRAINER.COOPOOD.BETA 0
run CoOpOOD --trainer CoOpOOD
run CoOpOOD-anchored --trainer CoOpOOD TRAINER.COOPOOD.ANCHOR attributes
"$PY" scripts/compare.py "$out" ZeroshotCLIP CoOp CoOp+linear L_s-only CoOpOOD CoOpOOD-anchored
