#!/usr/bin/env bash
# The paper's core comparison: pre-train on depth, flow and reconstruction, fine-tune for segmentation, print the table.
#
#   bash run_all.sh                                    # on the synthetic street world, rendered when missing
#   bash run_all.sh list                               # print the jobs, one complete command a line, and run nothing
#   DATA=kitti DATA_PATH=/data/kitti bash run_all.sh   # the same on KITTI with the paper's schedule
#
# Finished jobs are skipped, interrupted ones continue. Other settings: SEEDS="0 1 2", RUNS=runs/$DATA, PYTHON=python
# and JOBS, how many jobs run at a time (each prints a line when it ends; its output is in $RUNS/logs).
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-synthetic}
DATA_PATH=${DATA_PATH:-data/$DATA}
export RUNS=${RUNS:-runs/$DATA}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}

if [ "$DATA" = synthetic ]; then  # half an hour on two CPU cores, where one thread a job is the fastest
  JOBS=${JOBS:-2}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  pretrain="--height 64 --width 192 --batch_size 4 --steps 300 --learning_rate 2e-4 --num_workers 0 --cache"
  depth="--supervision stereo $pretrain" flow=$pretrain reconstruction=$pretrain
  finetune="--height 64 --width 192 --batch_size 4 --steps 80 --learning_rate 5e-4 --eval_every 40 --num_workers 0"
else  # the paper's settings (README, "Protocol")
  JOBS=${JOBS:-1}
  depth="--supervision mono+stereo --steps 66350 --batch_size 12 --learning_rate 1e-4"
  flow="--steps 249000 --batch_size 8 --learning_rate 5e-5 --learning_rate_drop 1"
  reconstruction="--steps 249000 --batch_size 8 --learning_rate_drop 0.5 --learning_rate_factor 0.5"
  finetune="--steps 20000 --batch_size 16 --learning_rate 1e-4 --eval_every 1000"
fi

# job NAME SCRIPT OPTION...: one line, a complete command
job() {
  local name=$1 script=$2
  shift 2
  printf '%q ' "$PYTHON" "$script" --data "$DATA" --data_path "$DATA_PATH" --log_dir "$RUNS" --name "$name" "$@"
  echo
}

# shellcheck disable=SC2086  # the settings above are words
pretraining_jobs() {
  job depth train_depth.py --task depth $depth
  job flow train_depth.py --task flow $flow
  job reconstruction train_depth.py --task reconstruction $reconstruction
}

# shellcheck disable=SC2086
finetuning_jobs() {
  local seed init mode from frozen
  for seed in $SEEDS; do
    for init in none flow reconstruction depth depth-encoder; do
      case $init in
        none) from=(--init none) ;;
        flow) from=(--init "$RUNS/flow" --init_parts encoder) ;;  # its decoder takes two frames' features
        depth-encoder) from=(--init "$RUNS/depth" --init_parts encoder) ;;  # what is comparable with flow
        *) from=(--init "$RUNS/$init") ;;
      esac
      for mode in all frozen; do
        frozen=()
        [ $mode = all ] || frozen=(--freeze_encoder)
        job "seg_${init}_${mode}_seed$seed" train_seg.py --train_size 16 --split_seed "$seed" --seed "$seed" $finetune \
          "${from[@]}" ${frozen[@]+"${frozen[@]}"}
      done
    done
  done
}

# one COMMAND: run it unless it is done; exit code 255 stops the others
one() {
  local name log code=0
  name=$(sed -E 's/.* --name ([^ ]+) .*/\1/' <<< "$1")
  log="$RUNS/logs/$name.txt"
  if [ -f "$RUNS/$name/result.json" ]; then
    echo "done already: $name"
    return
  fi
  bash -c "$1" > "$log" 2>&1 < /dev/null || code=$?
  case $code in
    0) echo "$(date +%H:%M:%S) $name: $(tail -n 1 "$log")" ;;
    75) echo "stopped, saved: $name" >&2 && exit 255 ;;
    *) echo "failed with exit code $code: $1" >&2 && tail -n 3 "$log" >&2 && exit 255 ;;
  esac
}
export -f one

case ${1:-all} in
  list)
    pretraining_jobs
    finetuning_jobs
    ;;
  all)
    mkdir -p "$RUNS/logs"
    if [ "$DATA" = synthetic ] && [ ! -e "$DATA_PATH" ]; then
      "$PYTHON" datasets.py render --data_path "$DATA_PATH"
    fi
    # shellcheck disable=SC2016  # the inner shell expands $0
    for stage in pretraining_jobs finetuning_jobs; do
      $stage | tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" bash -c 'one "$0"'
    done
    seed=${SEEDS%% *}
    "$PYTHON" evaluate.py grid --data "$DATA" --data_path "$DATA_PATH" --output "$RUNS/grid.png" --weights "$RUNS/depth" \
      "$RUNS/seg_none_all_seed$seed" "$RUNS/seg_flow_all_seed$seed" "$RUNS/seg_reconstruction_all_seed$seed" \
      "$RUNS/seg_depth_all_seed$seed"
    "$PYTHON" evaluate.py tables --log_dir "$RUNS"
    ;;
  *)
    echo "error: run_all.sh knows 'list' and no argument, not '$1'" >&2
    exit 2
    ;;
esac
