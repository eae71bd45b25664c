#!/usr/bin/env bash
# Group robustness: all training images, worst-group accuracy: DATA=FOLDER bash scripts/debiasedpt/groups.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
groups DebiasedPT "$@"
