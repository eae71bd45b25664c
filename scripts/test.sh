#!/usr/bin/env bash
# Installs (with the test extras) and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="[test]"
. scripts/environment.sh
exec "$PY" -m pytest "$@"
