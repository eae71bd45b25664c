# Sourced by the other scripts, from the repository's root: makes or reuses the virtual environment and sets $PY.
#   OODPROMPT_VENV   where it is (default .venv); reused while setup.py and the Python version have not changed
#   PYTHON           which Python makes it (default python3; 3.10 or newer)
# First argument: "" or "[test]", the extras to install.
extras="${1:-}"
venv="${OODPROMPT_VENV:-.venv}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $python is older than 3.10; set PYTHON to a newer one" >&2
  exit 2
}
key="$("$python" -c 'import hashlib, sys; print(sys.version_info[:2], hashlib.sha256(open("setup.py", "rb").read()).hexdigest())') $extras"
stamp="$venv/.oodprompt"
PY="$venv/bin/python"
if [ "$(sed -n 1p "$stamp" 2>/dev/null)" != "$key" ]; then
  echo "Installing into $venv (PyTorch and its libraries: a few minutes and some GB the first time) ..."
  [ -x "$PY" ] || "$python" -m venv "$venv"
  rm -f "$stamp"
  "$PY" -m pip install --quiet --disable-pip-version-check -e ".$extras"
  printf '%s\n%s\n' "$key" "$PWD" >"$stamp"
elif [ "$(sed -n 2p "$stamp")" != "$PWD" ]; then
  # The environment was made for another checkout: point it here.
  "$PY" -m pip install --quiet --disable-pip-version-check --no-deps -e .
  printf '%s\n%s\n' "$key" "$PWD" >"$stamp"
fi
