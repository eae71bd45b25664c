#!/usr/bin/env bash
# Cross-data-set transfer, first half: train on the source data set: DATA=FOLDER bash scripts/debiasedpt/xd_train.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
xd_train DebiasedPT "$@"
