#!/usr/bin/env bash
# Installs (with the test extras) and runs the tests, on as many processes as there are cores (OODPROMPT_TEST_JOBS: another
# number); arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="[test]"
. scripts/environment.sh
# One thread each: processes share the cores, and threads that wait for one another would cost more than they bring.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PY" -m pytest -n "${OODPROMPT_TEST_JOBS:-auto}" --dist loadfile "$@"
