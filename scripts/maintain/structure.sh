#!/usr/bin/env bash
# Checks the import contracts (lint-imports), and with --types the types (mypy), of the package as it is installed:
# with trainers/ and datasets/ inside it. $PY is the Python to use; default: python.
set -euo pipefail
repository="$(cd "$(dirname "$0")/../.." && pwd)"
PY="$(command -v "${PY:-python}")"
installed="$(mktemp -d)"
trap 'rm -rf "$installed"' EXIT
cp -rp "$repository/oodprompt" "$installed/"
cp -rp "$repository/trainers" "$repository/datasets" "$installed/oodprompt/"
cd "$installed"
# Paths of messages are those of the checkout.
as_in_checkout() { sed -E "s#^oodprompt/(trainers|datasets)/#\1/#"; }
PYTHONPATH="$installed" "$PY" -c 'from importlinter.cli import lint_imports_command as run; run()' \
  "$repository/pyproject.toml" --no-logo --no-cache
if [ "${1:-}" = "--types" ]; then
  "$PY" -m mypy --config-file "$repository/pyproject.toml" --cache-dir "$repository/.mypy_cache" -p oodprompt |
    as_in_checkout
fi
