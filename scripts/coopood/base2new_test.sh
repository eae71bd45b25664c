#!/usr/bin/env bash
# Base to new, second half: the model of base2new_train.sh on the new classes: DATA=FOLDER bash scripts/coopood/base2new_test.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
base2new_test CoOpOOD "$@"
