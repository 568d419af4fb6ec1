#!/usr/bin/env bash
# The paper's core comparison: pre-train on depth, flow and reconstruction, fine-tune for segmentation, print the table.
#
#   bash run_all.sh                                    # on the synthetic street world, rendered when missing
#   bash run_all.sh list                               # print the jobs, one complete command a line, and run nothing
#   DATA=kitti DATA_PATH=/data/kitti bash run_all.sh   # the same on KITTI with the paper's schedule
#
# Finished jobs are skipped, interrupted ones continue. SEEDS="0 1 2" RUNS=runs PYTHON=python are the other settings.
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-synthetic}
DATA_PATH=${DATA_PATH:-data/$DATA}
RUNS=${RUNS:-runs/$DATA}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}

if [ "$DATA" = synthetic ]; then  # minutes on two CPU cores
  pretrain="--height 64 --width 192 --batch_size 4 --steps 600 --learning_rate 2e-4 --num_workers 0 --cache"
  flow=$pretrain reconstruction=$pretrain
  finetune="--height 64 --width 192 --batch_size 8 --steps 200 --learning_rate 5e-4 --eval_every 50 --num_workers 0"
else  # the paper's settings (README, "Protocol")
  pretrain="--steps 66350 --batch_size 12 --learning_rate 1e-4"
  flow="--steps 249000 --batch_size 8 --learning_rate 5e-5"
  reconstruction="--steps 249000 --batch_size 8 --learning_rate 1e-4 --learning_rate_drop 0.5"
  finetune="--steps 20000 --batch_size 16 --learning_rate 1e-4 --eval_every 1000"
fi

quote() { printf '%q ' "$@"; }

# job NAME SCRIPT OPTION...: one line, a complete command
job() {
  local name=$1 script=$2
  shift 2
  quote "$PYTHON" "$script" --data "$DATA" --data_path "$DATA_PATH" --log_dir "$RUNS" --name "$name" "$@"
  echo
}

# shellcheck disable=SC2086  # the settings above are words
jobs_of_all() {
  job depth train_depth.py --task depth --supervision mono+stereo $pretrain
  job flow train_depth.py --task flow $flow
  job reconstruction train_depth.py --task reconstruction $reconstruction
  local seed from init
  for seed in $SEEDS; do
    for from in none flow reconstruction depth; do
      case $from in
        none) init="--init none" ;;
        flow) init="--init $(quote "$RUNS/flow") --init_parts encoder" ;;  # its decoder takes two frames' features
        *) init="--init $(quote "$RUNS/$from")" ;;
      esac
      for mode in all frozen; do
        job "seg_${from}_${mode}_seed$seed" train_seg.py --train_size 16 --split_seed "$seed" --seed "$seed" $finetune | tr -d '\n'
        echo "$init$([ $mode = all ] || echo ' --freeze_encoder')"
      done
    done
  done
}

if [ "${1:-}" = list ]; then
  jobs_of_all
  exit
fi
jobs_of_all | while read -r command; do
  name=$(sed -E 's/.* --name ([^ ]+) .*/\1/' <<< "$command")
  if [ -f "$RUNS/$name/result.json" ]; then
    echo "done already: $name"
  else
    bash -c "$command" < /dev/null
  fi
done
"$PYTHON" evaluate.py tables --log_dir "$RUNS"
