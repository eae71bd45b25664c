#!/usr/bin/env bash
# Checks and measures OODPrompt on a GPU, in under 9 minutes: bash speed/gpu.sh OUT [--upstream FOLDER] [--small] [--device cpu|cuda]
#   OUT                folder for the results: JSON lines as they come, summary.md at the end and after every case
#   --upstream FOLDER  also time the step code of upstream in FOLDER: Dassl.pytorch, CoOp, multimodal-prompt-learning
#   --small            every case with tiny models and one step, on any machine
#   --device           default: cuda
#   PYTHON             the Python to use; default: python3
# It needs this checkout and a Python with torch, torchvision and these packages, of which a bare torch machine lacks a few:
#   accelerate clip-anytorch filelock ftfy jinja2 kmedoids matplotlib numpy pillow pyyaml regex safetensors scikit-learn
#   scipy tabulate tensorboard tqdm yacs; pytest pytest-timeout pytest-xdist for the tests
# It tries to install what is missing with pip. Where pip reaches nothing, it names them and runs what can run without.
# To bring them along, install them elsewhere, for the same Python, with `pip install --no-deps --target FOLDER ...`, and
# start the script with PYTHONPATH=FOLDER. docs/gpu.md says what is measured.
set -uo pipefail
started_in="$PWD"
cd "$(dirname "$0")/.." || exit 2
python="${PYTHON:-python3}"
began=$SECONDS
usage() {
  echo "error: $1; usage: bash speed/gpu.sh OUT [--upstream FOLDER] [--small] [--device cpu|cuda]" >&2
  exit 2
}
out="" upstream="" device="cuda" small=()
while [ $# -gt 0 ]; do
  case "$1" in
    --small) small=(--small) ;;
    --upstream | --device)
      [ $# -gt 1 ] || usage "$1 needs a value"
      if [ "$1" = --upstream ]; then upstream="$2"; else device="$2"; fi
      shift
      ;;
    -*) usage "unknown option $1" ;;
    *) [ -z "$out" ] && out="$1" || usage "one folder OUT, not also $1" ;;
  esac
  shift
done
[ -n "$out" ] || usage "no folder OUT"
[ "$device" = cpu ] || [ "$device" = cuda ] || usage "--device is cpu or cuda, not $device"
absolute() { case "$1" in "" | /*) echo "$1" ;; *) echo "$started_in/$1" ;; esac; }
out="$(absolute "$out")" upstream="$(absolute "$upstream")"
mkdir -p "$out" || exit 2
if compgen -G "$out/*.jsonl" >/dev/null; then usage "$out already holds results"; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)" || usage "$python has no torch; set PYTHON to one that has"
if [ "$device" = cpu ]; then
  export OODPROMPT_GPU_TESTS=cpu
elif [ "$gpus" = 0 ]; then
  usage "torch sees no GPU here; with --device cpu --small every case runs once without one"
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one GPU: figures are of one

missing="$("$python" speed/gpu_cases.py missing)"
if [ -n "$missing" ]; then
  echo "Missing packages: $missing; trying pip ..."
  # shellcheck disable=SC2086
  timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --retries 0 --timeout 5 $missing >>"$out/log.txt" 2>&1
  missing="$("$python" speed/gpu_cases.py missing)"
  [ -z "$missing" ] || echo "Still missing: $missing. What cannot run without is left out."
fi

pid=""
summarise() { "$python" speed/gpu_cases.py summary "$out" >"$out/summary.md.new" && mv "$out/summary.md.new" "$out/summary.md"; }
finish() {
  if [ -n "$pid" ]; then kill -TERM "$pid" 2>/dev/null; wait "$pid"; fi
  summarise
  echo "After $((SECONDS - began)) s: $out/summary.md"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# run NAME LIMIT FILE MISSING COMMAND: one case; its standard output is added to FILE, the rest to log.txt.
run() {
  local name="$1" limit="$2" file="$3" lacks="$4" at=$SECONDS status left=$((total - SECONDS + began))
  if [ ${#small[@]} -gt 0 ]; then left="$limit"; elif [ "$limit" -gt "$left" ]; then limit="$left"; fi
  if [ "$lacks" != - ]; then
    status="left out: no $lacks"
  elif [ "$left" -lt 8 ]; then
    status="left out: no time is left"
  else
    echo "== $name" >>"$out/log.txt"
    bash -c "exec timeout -k 5 $limit '$python' $5" </dev/null >>"$out/$file" 2>>"$out/log.txt" &
    pid=$!
    wait "$pid"
    status=$?
    pid=""
    case "$status" in 0) status=ok ;; 124 | 137) status="stopped at its limit" ;; *) status="exit status $status" ;; esac
  fi
  printf '{"case": "%s", "status": "%s", "seconds": %d, "limit": %d}\n' "$name" "$status" $((SECONDS - at)) "$limit" >>"$out/cases.jsonl"
  echo "$name: $status, $((SECONDS - at)) s"
  summarise
}
total="$("$python" speed/gpu_cases.py total)"
plan="$("$python" speed/gpu_cases.py plan "${small[@]}" --device "$device" --upstream "$upstream")" || exit 2
while IFS=$'\t' read -r name limit file lacks command <&3; do
  run "$name" "$limit" "$file" "$lacks" "$command"
done 3<<<"$plan"
