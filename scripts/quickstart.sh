#!/usr/bin/env bash
# Installs (into .venv) and runs the main job on the embedded CLIP and rendered data: no downloads of weights or data.
# Ends in a table of six methods with worst-group accuracy and the paths of the pictures.
#   bash scripts/quickstart.sh [OUTPUT (default output/quickstart)] [SEEDS (default "1")]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

out="${1:-output/quickstart}"
read -ra seeds <<<"${2:-1}"
began=$SECONDS
"$PY" scripts/benchmark.py scripts/grids/quickstart.yaml --out "$out" --seeds "${seeds[@]}"
echo
echo "Pictures of each run: $out/<method>/seed*/groups.png and, where something is trained, training.png; tables: results.md; everything printed: log.txt"
echo "Took $((SECONDS - began)) s after installation."
