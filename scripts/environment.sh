# Sourced by the other scripts, from the repository's root: makes or reuses the virtual environment and sets $PY.
#   OODPROMPT_VENV   where it is (default .venv); reused while setup.py and the Python version have not changed
#   PYTHON           which Python makes it (default python3; 3.10 or newer)
#   extras           set by the sourcing script: empty or "[test]", the extras to install
extras="${extras:-}"
venv="${OODPROMPT_VENV:-.venv}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $python is older than 3.10 or missing; set PYTHON to a newer one" >&2
  exit 2
}
key="$("$python" -c 'import hashlib, sys; print(*sys.version_info[:2], hashlib.sha256(open("setup.py", "rb").read()).hexdigest())')"
stamp="$venv/.oodprompt" # lines: key, checkout, extras
PY="$venv/bin/python"
installed() { sed -n "$1p" "$stamp" 2>/dev/null || true; }
if [ "$(installed 1)" != "$key" ] || { [ -n "$extras" ] && [ "$(installed 3)" != "$extras" ]; }; then
  echo "Installing into $venv (PyTorch and its libraries: a few minutes and some GB the first time) ..."
  [ -x "$PY" ] || "$python" -m venv "$venv"
  rm -f "$stamp"
  "$PY" -m pip install --quiet --disable-pip-version-check -e ".$extras"
  printf '%s\n%s\n%s\n' "$key" "$PWD" "$extras" >"$stamp"
elif [ "$(installed 2)" != "$PWD" ]; then
  # The environment was made for another checkout: point it here.
  "$PY" -m pip install --quiet --disable-pip-version-check --no-deps -e .
  printf '%s\n%s\n%s\n' "$key" "$PWD" "$(installed 3)" >"$stamp.new"
  mv "$stamp.new" "$stamp"
fi
