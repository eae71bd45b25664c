#!/usr/bin/env bash
# Cross-data-set transfer, second half: the model of xd_train.sh on another data set: DATA=FOLDER bash scripts/debiasedpt/xd_test.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
xd_test DebiasedPT "$@"
