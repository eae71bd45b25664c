# Sourced by scripts/papers/*.sh: reproduce DATASET [arguments]. It trains what settings.yaml says. Then it prints a
# table beside the published numbers of published.csv. PYTHON names the Python (default: .venv of the checkout, else
# python).
set -euo pipefail

reproduce() {
  local here repository python
  here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
  repository="$(dirname "$(dirname "$here")")"
  python="$repository/.venv/bin/python"
  [ -x "$python" ] || python=python
  export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
  exec "${PYTHON:-$python}" "$here/reproduce.py" "$@"
}
