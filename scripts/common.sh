# Sourced by scripts/<trainer>/*.sh: one function for each kind of experiment, with the output folders of CoOp's and
# MaPLe's scripts. Called as  KIND TRAINER DATASET SEED [flags and KEY VALUE pairs of train.py] [--dry-run].
# DATASET is the name of a file in configs/datasets. Runs that are there are resumed, finished ones are evaluated again.
#   DATA     folder that holds the data sets (needed)
#   BASE     prompt learner under the debiaser; without it, the debiaser's own
#   CFG      method's file (default vit_b16_ep50_ctxv1), in configs/trainers/<trainer>, else in that of the base
#   SHOTS    training images per class (default 16); groups.sh and dg.sh take all unless it is set
#   NCTX, CSC, CTP   main.sh, over CoOp: context tokens (4; where the file has CTX_INIT, its words count), one context per class (False),
#            place of the class name (end)
#   SOURCE   xd_test.sh: data set that the model was trained on (default imagenet)
#   LOADEP   *_test.sh: epoch of the model (default the best by validation, else the last)
#   OUTPUT   folder of all results (default output);  PYTHON  which Python (default python)
#   --dry-run as one of the arguments: print the command
set -euo pipefail
for name in DATA OUTPUT PYTHON; do # relative to where the script is called; a PYTHON without "/" is looked for in PATH
  value="${!name:-}"
  [[ -z "$value" || "$value" == /* || ("$name" == PYTHON && "$value" != */*) ]] || declare "$name=$PWD/$value"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

begin() { # trainer, data set, seed, further arguments
  trainer="$1"
  [ $# -ge 3 ] || fail "usage: DATA=FOLDER bash $0 DATASET SEED [flags and KEY VALUE pairs of train.py] [--dry-run]"
  dataset="$2" seed="$3"
  [ -n "${DATA:-}" ] || fail "DATA is not set; give the folder that holds the data sets: DATA=FOLDER bash $0 $dataset $seed"
  cfg="${CFG:-vit_b16_ep50_ctxv1}" shots="${SHOTS:-16}" out="${OUTPUT:-output}"
  file="configs/trainers/$trainer/$cfg.yaml"
  [ -f "$file" ] || file="configs/trainers/${BASE:-CoOp}/$cfg.yaml"
  method="$trainer${BASE:+-$BASE}"
  shift 3
  dry="" more=()
  for word in "$@"; do
    case "$word" in
      --dry-run) dry=1 ;;
      --base | --base=*) fail "give the base as BASE=NAME in front: the output folder and the config file go by it" ;;
      *) more+=("$word") ;;
    esac
  done
}

run() { # output folder, then what this kind of experiment adds; the user's own arguments come last
  local folder="$1"
  shift
  local command=("${PYTHON:-python}" train.py --root "$DATA" --seed "$seed" --trainer "$trainer" ${BASE:+--base "$BASE"}
    --dataset-config-file "configs/datasets/$dataset.yaml" --config-file "$file" --output-dir "$folder"
    "$@" "${more[@]+"${more[@]}"}")
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  if [ -d "$folder" ]; then echo "$folder is there: going on with it"; else echo "Output: $folder"; fi
  "${command[@]}"
}

evaluate() { # output folder, folder of the model, then keys
  local folder="$1" model="$2"
  shift 2
  run "$folder" --eval-only --model-dir "$model" ${LOADEP:+--load-epoch "$LOADEP"} "$@"
}

main() {
  begin "$@"
  local place="$out/$dataset/$method/${cfg}_${shots}shots" keys=()
  if [ "${BASE:-CoOp}" = CoOp ]; then
    place+="/nctx${NCTX:-4}_csc${CSC:-False}_ctp${CTP:-end}"
    keys=(TRAINER.COOP.N_CTX "${NCTX:-4}" TRAINER.COOP.CSC "${CSC:-False}" TRAINER.COOP.CLASS_TOKEN_POSITION "${CTP:-end}")
  fi
  run "$place/seed$seed" DATASET.NUM_SHOTS "$shots" "${keys[@]+"${keys[@]}"}"
}

base2new() { # folder of one side: train_base, test_new
  echo "$out/base2new/$1/$dataset/shots_$shots/$method/$cfg/seed$seed"
}

base2new_train() {
  begin "$@"
  run "$(base2new train_base)" DATASET.NUM_SHOTS "$shots" DATASET.SUBSAMPLE_CLASSES base
}

base2new_test() {
  begin "$@"
  evaluate "$(base2new test_new)" "$(base2new train_base)" DATASET.NUM_SHOTS "$shots" DATASET.SUBSAMPLE_CLASSES new
}

xd_train() {
  begin "$@"
  run "$out/$dataset/$method/${cfg}_${shots}shots/seed$seed" DATASET.NUM_SHOTS "$shots"
}

xd_test() {
  begin "$@"
  local place="$method/${cfg}_${shots}shots"
  evaluate "$out/evaluation/$place/$dataset/seed$seed" "$out/${SOURCE:-imagenet}/$place/seed$seed"
}

dg() { # trainer, data set, seed, "DOMAIN ..." to test on, "DOMAIN ..." to train on, further arguments
  [ $# -ge 5 ] || fail "usage: DATA=FOLDER bash $0 DATASET SEED 'TARGET ...' 'SOURCE ...' [flags and KEY VALUE pairs]"
  local targets=() sources=()
  read -ra targets <<<"$4"
  read -ra sources <<<"$5"
  begin "${@:1:3}" "${@:6}"
  [ ${#targets[@]} -gt 0 ] && [ ${#sources[@]} -gt 0 ] || fail "dg needs domains to test on and domains to train on"
  local name
  name="$(IFS=_ && echo "${targets[*]}")"
  run "$out/dg/$dataset/$method/$cfg${SHOTS:+_${SHOTS}shots}/$name/seed$seed" \
    --source-domains "${sources[@]}" --target-domains "${targets[@]}" ${SHOTS:+DATASET.NUM_SHOTS "$SHOTS"}
}

groups() {
  begin "$@"
  run "$out/groups/$dataset/$method/$cfg${SHOTS:+_${SHOTS}shots}/seed$seed" ${SHOTS:+DATASET.NUM_SHOTS "$SHOTS"}
}
