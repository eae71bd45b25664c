#!/usr/bin/env bash
# Installs (with the test extras) and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh "[test]"
exec "$PY" -m pytest "$@"
