#!/usr/bin/env bash
# Base to new, first half: train on the base classes, test on them: DATA=FOLDER bash scripts/debiasedpt/base2new_train.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
base2new_train DebiasedPT "$@"
