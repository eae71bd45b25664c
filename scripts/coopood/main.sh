#!/usr/bin/env bash
# Few-shot classification, all classes: DATA=FOLDER bash scripts/coopood/main.sh DATASET SEED [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
main CoOpOOD "$@"
