#!/usr/bin/env bash
# Every experiment of the paper, one complete command a line.
#
#   bash run_all.sh                          # the core comparison on the synthetic street world, then its tables
#   bash run_all.sh table1 fig3              # the jobs of these, then their tables
#   bash run_all.sh list [NAME ... STAGE]    # print the jobs instead, of all names if none is given
#   DATA=kitti DATA_PATH=/data/kitti bash run_all.sh table1    # with the paper's schedule
#   KITTI=/data/kitti CAMVID=/data/camvid bash run_all.sh camvid    # small, from real video to real labels
#
# NAME: core table1 table2 table3 table4 table5 table6 fig2 fig3 fig4 fig5 fig6 fig7 fig8 release camvid
# STAGE: pretraining, finetuning (needs the former), pictures (needs both)
# Finished jobs are skipped, interrupted ones continue, a job that is running already is refused. Elsewhere, by stage:
#
#   bash run_all.sh list table1 pretraining | tr '\n' '\0' | xargs -0 -n 1 -P 4 bash -c
#   bash run_all.sh list table1 finetuning | parallel -j 4
#   bash -c "$(bash run_all.sh list table1 finetuning | sed -n "${SLURM_ARRAY_TASK_ID}p")"
#
# Settings: DATA (synthetic, kitti) and DATA_PATH; CITYSCAPES, NYU, VOC, ADE20K, KITTI, CAMVID, the roots of other data;
# WEIGHTS, the folder of downloaded checkpoints; SEEDS="0 1 2", of the draws of training images and of the new layers;
# RUNS=runs/$DATA; CACHE, a folder for packed copies of what is pre-trained on (default: $RUNS/cache for synthetic, none
# for real data); JOBS, how many at a time (their output is in $RUNS/logs); PYTHON=python.
set -euo pipefail
cd "$(dirname "$0")"

DATA=${DATA:-synthetic}
DATA_PATH=${DATA_PATH:-data/$DATA}
export RUNS=${RUNS:-runs/$DATA}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}
WEIGHTS=${WEIGHTS:-weights}

if [ "$DATA" = synthetic ]; then  # small: two CPU cores, where one thread a job is the fastest
  JOBS=${JOBS:-2} CACHE=${CACHE-$RUNS/cache}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  main=stereo size="--height 64 --width 192" other="--height 128 --width 384"
  depth="--batch_size 4 --steps 300 --learning_rate 2e-4 --num_workers 0" flow=$depth reconstruction=$depth
  batch=4 labels="--steps 80 --learning_rate 5e-4 --eval_every 20 --num_workers 0"
else  # the paper's settings (README, "Protocol")
  JOBS=${JOBS:-1} CACHE=${CACHE-}
  main=mono+stereo size="--height 192 --width 640" other="--height 96 --width 320"
  depth="--steps 66350 --batch_size 12 --learning_rate 1e-4"
  flow="--steps 249000 --batch_size 8 --learning_rate 5e-5 --learning_rate_drop 1"
  reconstruction="--steps 249000 --batch_size 8 --learning_rate_drop 0.5 --learning_rate_factor 0.5"
  batch=16 labels="--steps 20000 --learning_rate 1e-4 --eval_every 1000"
fi
data=(--data "$DATA" --data_path "$DATA_PATH") prefix="" video=()  # video: to pre-train on, where it is not the same

# ---------------------------------------------------------------------------------------------- jobs

# job NAME SCRIPT OPTION...: one line, a complete command
job() {
  local name=$prefix$1 script=$2
  shift 2
  printf '%q ' "$PYTHON" "$script" --name "$name" --log_dir "$RUNS" "$@"
  echo
}

# pretrain KIND ENCODER
# shellcheck disable=SC2086  # the settings above are words
pretrain() {
  local kind=$1 to=(--encoder "$2" ${CACHE:+--cache "$CACHE"})
  if [ ${#video[@]} -gt 0 ]; then to+=("${video[@]}"); else to+=("${data[@]}"); fi
  case $kind in
    depth) job "depth_$2" train_depth.py "${to[@]}" --supervision $main --init imagenet $size $depth ;;
    depthrand) job "depthrand_$2" train_depth.py "${to[@]}" --supervision $main $size $depth ;;
    cropped) job "cropped_$2" train_depth.py "${to[@]}" --supervision $main --init imagenet $size $depth --crop 256 256 ;;
    resized) job "resized_$2" train_depth.py "${to[@]}" --supervision $main $other $depth ;;
    lidar) job "lidar_$2" train_depth.py "${to[@]}" --supervision depth $size $depth ;;
    stereo | mono) job "${kind}_$2" train_depth.py "${to[@]}" --supervision "$kind" $size $depth ;;
    flow) job "flow_$2" train_depth.py "${to[@]}" --task flow $size $flow ;;
    reconstruction) job "reconstruction_$2" train_depth.py "${to[@]}" --task reconstruction $size $reconstruction ;;
  esac
}

# finetune INIT ENCODER ARCH MODE IMAGES [TAG OPTION...]: the pre-training that INIT needs, then one job a seed
# INIT: none, imagenet, a KIND of pretrain (KIND-encoder leaves the decoder fresh), or a downloaded checkpoint
# MODE: all, frozen; IMAGES for training, or all; a TAG names what the OPTIONs change
# shellcheck disable=SC2086
finetune() {
  local init=$1 encoder=$2 arch=$3 mode=$4 images=$5 tag=${6:+_$6} seed from options=()
  shift $(($# < 6 ? $# : 6))
  case $init in
    none | imagenet) from=$init ;;
    moco) from=$WEIGHTS/moco_v2_800ep_pretrain.pth.tar ;;
    dino) from=$WEIGHTS/dino_resnet50_pretrain.pth ;;
    coco) from=$WEIGHTS/deeplabv3_resnet50_coco-cd0a2569.pth ;;
    vit) from=$WEIGHTS/vit_l_16-852ce7e3.pth ;;
    dpt) from=$WEIGHTS/dpt_large-midas-2f21e586.pt ;;
    mae) from=$WEIGHTS/mae_pretrain_vit_large.pth ;;
    dinov2) from=$WEIGHTS/dinov2_vitl14_pretrain.pth ;;
    depthanything) from=$WEIGHTS/depth_anything_vitl14.pth ;;
    *) pretrain "${init%-encoder}" "$encoder" && from=$RUNS/$prefix${init%-encoder}_$encoder ;;
  esac
  # a decoder is kept only where it is the same one: flow's takes two frames' features, DeepLab's head is its own
  case $init-$arch in
    none-* | imagenet-*) ;;
    flow-* | *-encoder-* | moco-* | dino-* | coco-*) options+=(--init_parts encoder) ;;
    *-unet) ;;
    *) [ "$prefix$arch" = cityscapes_deeplabv3 ] || options+=(--init_parts encoder) ;;
  esac
  [ "$mode" = all ] || options+=(--freeze_encoder)
  [ "$images" = all ] || options+=(--train_size "$images")
  options+=(--batch_size "$([ "$images" != all ] && [ "$images" -lt $batch ] && echo "$images" || echo $batch)")
  for seed in $SEEDS; do
    job "seg_${init}_${encoder}_${arch}_${mode}_n$images${tag}_seed$seed" train_seg.py "${data[@]}" --encoder "$encoder" \
      --arch "$arch" --init "$from" --split_seed "$seed" --seed "$seed" $size $labels ${options[@]+"${options[@]}"} "$@"
  done
}

# pictures COMMAND FILE MODEL...: of runs, or of the first seed's 16-image fine-tunings from these initialisations
pictures() {
  local command=$1 file=$2 model weights=()
  shift 2
  for model in "$@"; do
    [ "$model" != "${model#*/}" ] || model=$RUNS/seg_${model}_resnet18_unet_all_n16_seed${SEEDS%% *}
    weights+=("$model")
  done
  printf '%q ' "$PYTHON" evaluate.py "$command" "${data[@]}" --output "$RUNS/$file" --weights "${weights[@]}"
  echo
}

# ---------------------------------------------------------------------------------------------- tables and figures

# each "INIT..." "ENCODER..." ARCH MODE IMAGES [TAG OPTION...]: `finetune` from every one
each() {
  local init encoder
  for encoder in $2; do
    for init in $1; do finetune "$init" "$encoder" "${@:3}"; done
  done
}

paper="none imagenet depthrand depth" ours="none flow reconstruction depthrand depthrand-encoder"

core() {  # what one reads first: every pre-training of our own from random weights
  each "$ours" resnet18 unet all 16
  each "$ours" resnet18 unet frozen 16
  pictures grid core.png "$RUNS/depthrand_resnet18" none flow reconstruction depthrand
}

table1() {  # KITTI, 16 images: initialisations, architectures, frozen encoder
  each "$paper" "resnet18 resnet50" unet all 16
  each "$paper" resnet50 deeplabv3 all 16
  each "$paper" "resnet18 resnet50" unet frozen 16
}

table2() { each "none mono stereo lidar" resnet18 unet all 16; }  # forms of depth supervision

table3() {  # the encoder alone, and a vision transformer
  each "none imagenet depthrand-encoder depth-encoder" "resnet18 resnet50" unet all 16
  each "vit dpt" vit_l16 dpt all 16 lr5e-8 --learning_rate 5e-8
}

table4() { each "none depthrand depth reconstruction flow coco dino moco" resnet50 unet all 16; }  # other pre-trainings

# shellcheck disable=SC2034  # `finetune` and `pretrain` read these
table5() {  # Cityscapes, DeepLabV3, all images: the full schedule with jitter, and a controlled one
  local data=(--data cityscapes --data_path "${CITYSCAPES:-data/cityscapes}") prefix=cityscapes_ main=depth init rate
  local size="--height 1024 --width 2048" depth="--arch deeplabv3 --steps 60000 --batch_size 8"
  local batch=32 labels="--crop 512 512 --optimizer sgd --schedule poly"
  for init in none imagenet depth cropped; do
    rate=0.1
    [ $init != imagenet ] || rate=0.01
    finetune $init resnet50 deeplabv3 all all full --steps 50000 --jitter 0.5 --learning_rate $rate
    finetune $init resnet50 deeplabv3 all all controlled --steps 20000 --learning_rate $rate
  done
}

# shellcheck disable=SC2034
table6() {  # large-scale pre-trainings on other domains: fine-tuned, and a linear probe
  local name data prefix size init batch=16 labels="--steps 40000 --learning_rate 1e-5"
  for name in ade20k voc cityscapes; do
    case $name in
      ade20k) data=(--data ade20k --data_path "${ADE20K:-data/ade20k}") size="--height 896 --width 896" ;;
      voc) data=(--data voc --data_path "${VOC:-data/voc}") size="--height 560 --width 560" ;;
      cityscapes) data=(--data cityscapes --data_path "${CITYSCAPES:-data/cityscapes}") size="--height 448 --width 896" ;;
    esac
    prefix=${name}_
    for init in mae dinov2 depthanything; do
      finetune $init "$([ $init = mae ] && echo vit_l16 || echo vit_l14)" dpt all all
      finetune $init "$([ $init = mae ] && echo vit_l16 || echo vit_l14)" linear frozen all lr1e-3 --learning_rate 1e-3
    done
  done
}

fig2() { each "$paper" "resnet18 resnet50" unet all 16; }  # curves of training from each initialisation

fig3() {  # size of the training set
  local images
  for images in 8 16 32 64 128; do each "$paper" resnet18 unet all $images; done
}

fig4() { each "$paper" "resnet18 resnet50" unet frozen 16; }  # frozen encoders

# shellcheck disable=SC2086
fig5() {  # pre-training at one resolution, fine-tuning at another, both ways
  each "depthrand resized" resnet18 unet all 16
  each "none depthrand" resnet18 unet all 16 resized $other
}

# shellcheck disable=SC2086
fig6() {  # activations of a shallow layer, and segmentations
  each "$paper" resnet18 unet all 16
  pictures gradcam fig6.png $paper
}

fig7() {  # depth helps, flow hurts
  each "none flow depthrand depth" resnet18 unet all 16
  each "none flow depthrand depth" resnet18 unet frozen 16
}

# shellcheck disable=SC2034
fig8() {  # NYU-v2
  local data=(--data nyu --data_path "${NYU:-data/nyu}") prefix=nyu_ main=depth
  local size="--height 384 --width 448" depth="--steps 100000 --batch_size 8 --min_depth 0.1 --max_depth 10"
  local batch=16 labels="--steps 20000 --learning_rate 1e-4"
  each "none imagenet depth" "resnet18 resnet50" unet all all
}

release() {  # two behaviours of the authors' release: inputs normalised twice, a "freeze" of batch norm alone
  each "none imagenet depthrand" resnet18 unet all 16 twice --normalize_twice
  each "none imagenet depthrand" resnet18 unet frozen 16
  each "none imagenet depthrand" resnet18 unet all 16 batchnorm --freeze_batch_norm_only
}

# shellcheck disable=SC2034
camvid() {  # real video to real labels, small: stereo pairs of KITTI's drives, then 16 and 64 images of CamVid
  local data=(--data camvid --data_path "${CAMVID:-data/camvid}") video=(--data kitti --data_path "${KITTI:-data/kitti}")
  local prefix=camvid_ main=stereo small="--batch_size 4 --num_workers 0" size="" batch=4 mode init rate part
  local depth="--height 64 --width 192 --steps 3000 --learning_rate 2e-4 $small"
  local flow=$depth reconstruction=$depth
  local labels="--height 96 --width 128 --steps 300 --learning_rate 5e-4 --eval_every 60 --num_workers 0"
  each "$ours" resnet18 unet all 16
  each "$ours" resnet18 unet frozen 16
  # two behaviours of the authors' release
  each "none depthrand-encoder" resnet18 unet all 16 twice --normalize_twice
  each "none depthrand-encoder" resnet18 unet all 16 batchnorm --freeze_batch_norm_only
  # four times the images, twice the steps
  for mode in all frozen; do each "$ours" resnet18 unet $mode 64 "" --steps 600 --eval_every 120; done
  # other learning rates, the same for each
  for rate in 2e-4 1e-3; do each "$ours" resnet18 unet all 16 lr$rate --learning_rate $rate; done
  local video_of=("${video[@]}") depth_of=$depth
  for part in quarter short large; do  # pre-trained on a quarter of each drive, for a quarter of the steps, at another size
    prefix=camvid_${part}_ video=("${video_of[@]}") depth=$depth_of
    case $part in
      quarter) video+=(--frames 0:36) ;;
      short) depth=${depth/3000/750} ;;
      large) depth=${depth/--height 64 --width 192/--height 96 --width 320} ;;
    esac
    reconstruction=$depth
    each "reconstruction depthrand" resnet18 unet frozen 16
  done
}

# ---------------------------------------------------------------------------------------------- running

everything="core table1 table2 table3 table4 table5 table6 fig2 fig3 fig4 fig5 fig6 fig7 fig8 release camvid"


# list NAME... [STAGE]: the jobs, none twice
list() {
  local script=
  case ${*: -1} in
    pretraining) script=train_depth.py ;;
    finetuning) script=train_seg.py ;;
    pictures) script=evaluate.py ;;
  esac
  [ -z "$script" ] || set -- "${@:1:$#-1}"
  # shellcheck disable=SC2086
  [ $# -gt 0 ] || set -- $everything
  for name in "$@"; do
    [[ " $everything " == *" $name "* ]] || { echo "error: '$name' is none of: list $everything" >&2 && exit 2; }
  done
  for name in "$@"; do $name; done | awk -v script="${script:- }" 'index($0, script) && !seen[$0]++'
}

# one COMMAND: run it unless it is done; exit code 255 stops the others
one() {
  local name log code=0
  name=$(sed -E 's/.* --(name|output) (([^ \\]|\\.)+) .*/\2/; s/.*\///' <<< "$1")  # \. is an escaped space
  log="$RUNS/logs/$name.txt"
  if [ -f "$RUNS/$name/result.json" ]; then
    echo "done already: $name"
    return
  fi
  bash -c "$1" > "$log" 2>&1 < /dev/null || code=$?
  case $code in
    0) echo "$(date +%H:%M:%S) $name: $(tail -n 1 "$log")" ;;
    75) echo "stopped, saved: $name" >&2 && exit 255 ;;
    *) echo "failed with exit code $code: $name: $(tail -n 1 "$log")" >&2 && exit 1 ;;
  esac
}
export -f one

if [ "${1:-}" = list ]; then
  list "${@:2}"
  exit
fi
[ $# -gt 0 ] || set -- core
list "$@" > /dev/null  # refuses an unknown name
mkdir -p "$RUNS/logs"
if [ "$DATA" = synthetic ] && [ ! -e "$DATA_PATH" ]; then
  "$PYTHON" datasets.py render --data_path "$DATA_PATH"
fi
failed=0
for stage in pretraining finetuning pictures; do  # a job that fails does not keep the others from their results
  # shellcheck disable=SC2016  # the inner shell expands $0
  list "$@" $stage | tr '\n' '\0' | xargs -0 -r -n 1 -P "$JOBS" bash -c 'one "$0"' || failed=$?
  [ $failed != 124 ] || exit 75  # xargs's code for a 255, a job stopped by a signal
done
"$PYTHON" evaluate.py tables --log_dir "$RUNS"
[ $failed = 0 ] || { echo "error: some jobs failed, see above and $RUNS/logs" >&2 && exit 2; }
