#!/usr/bin/env bash
# Everything that a GPU is needed for, what tells most in the least time first:
#
#   scripts/gpu.sh RESULTS --data MVTEC_AD --weights RESNET18.safetensors
#   scripts/gpu.sh RESULTS --trial      # the same in small, on a CPU too
#
# The same command goes on where the last one ended, trainings from their checkpoints. RESULTS gets
# a file NAME.out from every step that is complete, runs/, log.txt, summary.json and summary.txt.
#
#   --data DIR        MVTec AD, with bottle and screw; without it, the embedded images
#   --weights FILE    ResNet18's; without it, those of the Hugging Face hub
#   --epochs N        of Scenario A (300)
#   --seconds N       end in good order after so long
#   --only NAMES      of steps, with * and |, such as 'latency|mod1_a-*'
#   --trial           tiny images, one epoch
#
# PYTHON names the interpreter that has ssn_jax, python if unset. Exit status: 0 if all is complete,
# 1 for a mistake, 2 if a step failed (the others are run), 124 if the time was up, 130 or 143 after
# Ctrl-C or SIGTERM.
set -u
{ # Read to its end before it begins, so that it may change while it runs.

fail() {
  echo "error: $*" >&2
  exit 1
}

here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python}
data='' weights='' epochs='' seconds=0 only='*' trial=''
if [[ ${1:---help} == -* ]]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
results=$1
shift
while (($#)); do
  case $1 in
    --trial) trial=1 && shift && continue ;;
    --data | --weights | --epochs | --seconds | --only) ;;
    *) fail "no flag $1 (--help lists what there is)." ;;
  esac
  (($# > 1)) || fail "$1 needs a value."
  printf -v "${1#--}" %s "$2"
  shift 2
done
: "${epochs:=${trial:-300}}"
[[ $epochs =~ ^[1-9][0-9]*$ ]] || fail "--epochs=$epochs is no number of epochs."
[[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds=$seconds is no number of seconds."

categories=(bottle screw)
[[ $data ]] || categories=(bearing screw)
# XLA everywhere, which is what computes on a GPU.
common=(--config.engine=xla "--config.data.root=$data")
auto=() timed=(--configs 'mod1_a,edge,auto') turns=() precise=(--precisions 'float32,bfloat16')
if [[ $trial ]]; then
  common+=('--config.image_size=(64, 64)' --config.batch_size=8 --config.sparse=False)
  common+=(--config.decision.parts=0)
  auto=(--config.epochs=1 --config.drawn.count=8)
  timed=(--configs auto) turns=(--turns 7) precise=()
fi
"$python" "$here/gpu.py" begin "$results" "epochs=$epochs trial=${trial:-0}" || exit 1

child='' stopped=''
names=() left=() failed=()
# shellcheck disable=SC2329 # The traps call it.
stop() {
  stopped=$1
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# step NAME COMMAND...: runs a command, unless it was complete before.
step() {
  local name=$1 began=$SECONDS rest=0 status
  shift
  names+=("$name")
  # shellcheck disable=SC2053 # A pattern.
  [[ $name == @($only) && ! -e $results/$name.out ]] || return 0
  ((seconds == 0)) || rest=$((seconds - SECONDS))
  if [[ $stopped ]] || ((rest < 0 || (seconds && rest == 0))); then
    left+=("$name")
    return 0
  fi
  echo "$name ..."
  echo "== $name, $(date -u +%FT%TZ)" >>"$results/log.txt"
  timeout -k 60 "$rest" "$@" >"$results/$name.part" 2>>"$results/log.txt" &
  child=$!
  while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
  child=''
  echo "$name,$status,$((SECONDS - began))" >>"$results/steps.csv"
  if ((status == 0)); then
    mv "$results/$name.part" "$results/$name.out"
  elif [[ $stopped ]] || ((status == 124)); then
    left+=("$name")
  else
    failed+=("$name")
    echo "  failed, exit status $status: $(tail -n 1 "$results/log.txt")"
  fi
}

# train NAME FLAG...: a run, measured again in a process of its own, on all local devices.
train() {
  local name=$1
  shift
  step "$name" "$python" -m ssn_jax train "$@" "${common[@]}" --workdir "$results/runs/$name"
  evaluate "$name" float32
}

# evaluate RUN PRECISION [PLATFORM]: the scores of a complete run.
evaluate() {
  local name=$1-$2${3:+-$3}
  [[ -e $results/$1.out ]] || { names+=("$name") && return 0; }
  step "$name" env ${3:+"JAX_PLATFORMS=$3"} "$python" -m ssn_jax evaluate \
    --workdir "$results/runs/$1" --engine xla --config.precision="$2" \
    --output "$results/$name.csv"
}

# Is float32 float32 here, and not TensorFloat-32? The CPU knows no other.
precisions() {
  evaluate "$1" float32 cpu
  evaluate "$1" tensorfloat32
  evaluate "$1" bfloat16
}

# The models that one would take instead, in PyTorch.
against() {
  local needed='from importlib.util import find_spec as f
exit(not all(map(f, ("anomalib", "torch", "timm"))))'
  # shellcheck disable=SC2053 # A pattern.
  if [[ against != @($only) ]] || "$python" -c "$needed"; then
    step against env XLA_PYTHON_CLIENT_PREALLOCATE=false \
      "$python" -m ssn_jax benchmark --against anomalib --json "${turns[@]}" "${precise[@]}"
  else
    names+=(against)
    echo 'against: skipped, anomalib, torch or timm is not installed.' | tee "$results/against.skipped"
  fi
}

of_resnet18=(--config.backbone.name=resnet18 "--config.backbone.weights=$weights")
first="--config.data.category=${categories[0]}" second="--config.data.category=${categories[1]}"

step latency "$python" -m ssn_jax benchmark "${timed[@]}" --json "${turns[@]}" "${precise[@]}"
train "edge-${categories[0]}" --config edge "$first" "${auto[@]}"
precisions "edge-${categories[0]}"
against
train "auto-${categories[0]}" --config auto "$first" "${of_resnet18[@]}" "${auto[@]}"
train "edge-${categories[1]}" --config edge "$second" "${auto[@]}"
train "auto-${categories[1]}" --config auto "$second" "${of_resnet18[@]}" "${auto[@]}"
train "mod1_a-${categories[0]}" --config mod1_a "$first" "${of_resnet18[@]}" \
  "--config.epochs=$epochs"
precisions "mod1_a-${categories[0]}"
train "mod1_a-${categories[1]}" --config mod1_a "$second" "${of_resnet18[@]}" \
  "--config.epochs=$epochs"

"$python" "$here/gpu.py" summary "$results" || exit 1
# shellcheck disable=SC2053 # A pattern.
for name in "${names[@]}"; do [[ $name == @($only) ]] && matched=1; done
[[ ${matched:-} ]] || fail "--only=$only names no step of ${names[*]}."
echo "The summary is in $results/summary.txt and $results/summary.json."
((${#left[@]} == 0)) || echo "The same command goes on with ${left[*]}."
[[ -z $stopped ]] || exit "$stopped"
((${#left[@]} == 0)) || exit 124
((${#failed[@]} == 0)) || exit 2
exit 0
}
