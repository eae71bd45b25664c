#!/usr/bin/env bash
# Domain generalisation: train on some domains, test on others: DATA=FOLDER bash scripts/coopood/dg.sh DATASET SEED 'TARGET ...' 'SOURCE ...' [...]; more in scripts/common.sh.
. "$(dirname "$0")/../common.sh"
dg CoOpOOD "$@"
