#!/usr/bin/env bash
# RaVL's controlled evaluation, reduced: ten settings (every digit goes with a red rectangle once), three seeds for validity
# and discovery, one for mitigations; one table. Under 40 minutes on 2 CPU cores.
#   bash scripts/ravl/controlled_eval.sh DIGITS [OUTPUT (default output/ravl_controlled)] [more arguments of controlled_eval.py]
# DIGITS: folder of MNIST's idx files. The paper's grid: --mitigation-seeds 1 2 3 --v 0.7 0.8 0.9 0.95 0.99 --train 10000, and again
# with --kind fashion.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/environment.sh
digits="${1:?give the folder of MNIST\'s idx files}"
out="${2:-output/ravl_controlled}"
shift $(($# < 2 ? $# : 2))
exec "$PY" scripts/ravl/controlled_eval.py --root "$digits" --out "$out" --mitigation-seeds 1 "$@"
