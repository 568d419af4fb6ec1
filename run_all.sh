#!/usr/bin/env bash
# Every experiment of the paper, one line each.
#
#   bash run_all.sh                       # core: the comparison on the synthetic street, no downloads
#   bash run_all.sh table1 fig3           # the jobs of these, then their tables
#   bash run_all.sh list [NAME ...]       # print the commands instead
#   DATA=kitti KITTI=/data/kitti bash run_all.sh table1       # the paper's data and schedule
#   DATA=kitti PUBLISHED=1 bash run_all.sh table1             # Monodepth2's weights instead of pre-training
#   KITTI_RAW=… KITTI_LABELS=… CAMVID=… bash run_all.sh real  # the claim, tested on real video and labels
#
# NAME: core table1 table2 table3 table4 table5 table6 fig2 fig3 fig4 fig5 fig6 fig7 fig8 release real
#
# A finished job is skipped, an interrupted one continues. Commands may also run elsewhere, one stage
# (pretraining, finetuning, evaluation) after the other:
#
#   bash run_all.sh list table1 pretraining | tr '\n' '\0' | xargs -0 -n 1 -P 4 bash -c
#   bash -c "$(bash run_all.sh list table1 finetuning | sed -n "${SLURM_ARRAY_TASK_ID}p")"
#
# Settings, from the environment; relative paths count from this script's folder:
#   DATA=synthetic|kitti   SEEDS="0 1 2"   JOBS at a time   RUNS, the folder of runs   PYTHON=python
#   KITTI (or KITTI_RAW and KITTI_LABELS), CITYSCAPES, NYU (labelled), NYU_RAW (scenes), VOC, ADE20K, CAMVID: roots
#   STREET, where the street is rendered   SUFFIX=jpg|png of KITTI's frames
#   WEIGHTS=weights, downloaded checkpoints   CACHE, a folder for decoded frames
#   of real: REAL=runs/real, its folder of runs   SIZE="64 192"   CAMVID_SIZE="96 128"   BATCH=4
#   pre-training STEPS=1000 at RATE=1e-3, fine-tuning TUNING_STEPS=300 at TUNING_RATE=1e-3
# shellcheck disable=SC2034,SC2046,SC2086  # settings are words; functions read those of their caller
# shellcheck disable=SC2329  # called by name
set -euo pipefail
shopt -s inherit_errexit  # an error in $(…) ends the script, too
cd "$(dirname "$0")"

fail() {
  echo "error: $*" >&2
  exit 2
}

# ------------------------------------------------------------------------------------------- settings

DATA=${DATA:-synthetic}
PUBLISHED=${PUBLISHED:-}
RUNS=${RUNS:-runs/$DATA${PUBLISHED:+_published}}
REAL=${REAL:-runs/real}
STREET=${STREET:-data/synthetic}
KITTI=${KITTI:-data/kitti} KITTI_RAW=${KITTI_RAW:-$KITTI} KITTI_LABELS=${KITTI_LABELS:-$KITTI}
CITYSCAPES=${CITYSCAPES:-data/cityscapes} CAMVID=${CAMVID:-data/camvid}
NYU=${NYU:-data/nyu} NYU_RAW=${NYU_RAW:-data/nyu_raw}
VOC=${VOC:-data/voc} ADE20K=${ADE20K:-data/ade20k}
WEIGHTS=${WEIGHTS:-weights}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647  # glibc keeps freed memory: faster on a CPU

case $DATA in
  synthetic | kitti) ;;
  *) fail "DATA=$DATA is none of: synthetic kitti" ;;
esac
[ -z "$PUBLISHED" ] || [ "$DATA" = kitti ] ||
  fail "PUBLISHED=1, Monodepth2's weights, needs DATA=kitti"

if [ "$DATA" = synthetic ]; then  # two CPU cores: small, one thread per job
  JOBS=${JOBS:-2} CACHE=${CACHE-$RUNS/cache}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  video=(--data synthetic --data_path "$STREET") labels=("${video[@]}")
  frames=$STREET/2011_09_26/2011_09_26_drive_9001_sync/image_02/data suffix=png  # for pictures of flow
  main=stereo size="--height 64 --width 192" large="--height 128 --width 384"
  depth="--steps 250 --batch_size 4 --learning_rate 1e-3 --num_workers 0" flow=$depth reconstruction=$depth
  batch=4 tuning="--steps 60 --learning_rate 2e-3 --eval_every 30 --num_workers 0"
  counts="8 16 32"  # 51 of the street's labelled images are for training
else  # the paper's settings: 20 epochs of 39,810 samples for depth, 50 for flow and reconstruction
  JOBS=${JOBS:-1} CACHE=${CACHE-}
  video=(--data kitti --data_path "$KITTI_RAW") labels=(--data kitti --data_path "$KITTI_LABELS")
  frames=$KITTI_RAW/2011_09_26/2011_09_26_drive_0013_sync/image_02/data suffix=${SUFFIX:-jpg}
  main=mono+stereo size="--height 192 --width 640" large="--height 320 --width 1024"
  depth="--steps 66350 --batch_size 12 --learning_rate 1e-4 --learning_rate_drop 0.75 --learning_rate_factor 0.1"
  flow="--steps 248800 --batch_size 8 --learning_rate 5e-5 --learning_rate_drop 1 --learning_rate_factor 1"
  reconstruction="--steps 248800 --batch_size 8 --learning_rate 1e-4"
  reconstruction+=" --learning_rate_drop 0.5 --learning_rate_factor 0.5"
  batch=16 tuning="--steps 20000 --learning_rate 1e-4 --eval_every 1000"
  counts="8 16 32 64 128"
fi
prefix=""         # of names, on other data
of=""             # of names of fine-tunings, on other labels
seed_of_video=""  # a pre-training for each seed (real); else seed 0 serves all fine-tunings

# ------------------------------------------------------------------------------------------- experiments
# each "PRE-TRAINING…" "ENCODER…" ARCHITECTURE all|frozen IMAGES [TAG OPTION…]
# trains what is missing of the pre-trainings, then fine-tunes from every one, once a seed.
# NAME-encoder hands over the encoder alone.

paper="none imagenet depthrand depth"

core() {  # what one reads first: pre-trainings from random weights
  local small=efficientnet_lite0 kind
  for kind in depthrand flow reconstruction; do pretrain $kind $small; done
  each "none" $small unet all 16
  each "none calibrated" $small unet frozen 16
  each "flow-encoder reconstruction depthrand depthrand-encoder" $small unet all 16
  each "flow-encoder reconstruction depthrand depthrand-encoder" $small unet frozen 16
  picture grid core.png $small "none flow-encoder reconstruction depthrand"
}

table1() {  # KITTI, 16 images
  each "$paper" "resnet18 resnet50" unet all 16
  each "$paper" resnet50 deeplabv3 all 16
  each "$paper calibrated" "resnet18 resnet50" unet frozen 16
}

table2() {  # forms of depth supervision
  each "none imagenet mono stereo lidar" resnet18 unet all 16
}

table3() {  # the encoder alone; a ViT whose encoder learns at 5e-8, and a grid around it
  each "none imagenet depthrand-encoder depth-encoder" "resnet18 resnet50" unet all 16
  each "vit dpt" vit_l16 dpt all 16 lr5e-9 --learning_rate 1e-4 --encoder_learning_rate_factor 5e-5
  each "vit dpt" vit_l16 dpt all 16 lr5e-8 --learning_rate 1e-4 --encoder_learning_rate_factor 5e-4
  each "vit dpt" vit_l16 dpt all 16 lr5e-7 --learning_rate 1e-4 --encoder_learning_rate_factor 5e-3
  each "vit dpt" vit_l16 dpt all 16 lr5e-6 --learning_rate 1e-4 --encoder_learning_rate_factor 5e-2
}

table4() {  # other pre-trainings
  each "$paper coco dino moco" resnet50 unet all 16
  each "flow-encoder flowimagenet-encoder" resnet50 unet all 16
  each "reconstruction reconstruction-encoder release-encoder" resnet50 unet all 16
}

table5() {  # Cityscapes: 22,973 pairs with disparity, 80 epochs; "controlled" is ours: 20,000 steps without jitter
  local prefix=cityscapes_ stride="--output_stride 16"
  local video=(--data cityscapes --data_path "$CITYSCAPES")
  local labels=("${video[@]}")
  local size="--height 576 --width 640" main=depth
  local depth="--arch deeplabv3 $stride --crop 512 512 --steps 91900 --batch_size 20 --min_depth 2 --depth_rows 0.1 0.7"
  depth+=" --learning_rate 1e-4 --learning_rate_drop 0.0625 0.5 0.875 --learning_rate_factor 5 2 1"
  local tuning_size="--height 1024 --width 2048" batch=32 full="--steps 50000 --jitter 0.5" controlled="--steps 20000"
  local tuning="$stride --crop 512 512 --optimizer sgd --weight_decay 1e-4 --schedule poly --eval_every 5000"
  each "none depth cropped" resnet50 deeplabv3 all all full $full --learning_rate 0.1
  each "none depth cropped" resnet50 deeplabv3 all all controlled $controlled --learning_rate 0.1
  each imagenet resnet50 deeplabv3 all all full $full --learning_rate 0.01
  each imagenet resnet50 deeplabv3 all all controlled $controlled --learning_rate 0.01
  each imagenet-fast resnet50 deeplabv3 all all full $full --learning_rate 0.1
  each imagenet-fast resnet50 deeplabv3 all all controlled $controlled --learning_rate 0.1
  training_scores "none imagenet imagenet-fast depth cropped" resnet50_deeplabv3_all_nall_full
  training_scores "none imagenet imagenet-fast depth cropped" resnet50_deeplabv3_all_nall_controlled
}

table6() {  # large pre-trainings on other domains: the same decoder for all three, and a linear probe
  local recipe="--scale 0.5 2 --jitter 0.5 --optimizer adamw --schedule poly --poly_power 1 --warmup_steps 1500"
  recipe+=" --weight_decay 0.05 --clip_gradients 0.01 --eval_mode slide --eval_every 20000"
  # sizes that patches of 14 and of 16 divide
  other_domain ade20k "$ADE20K" "896 896" "896 896" 160000
  other_domain cityscapes "$CITYSCAPES" "1008 2016" "896 896" 80000
  other_domain voc "$VOC" "518 518" "518 518" 40000
}

fig2() {  # how fast each start learns
  each "$paper" "resnet18 resnet50" unet all 16
}

fig3() {  # number of training images
  local images
  for images in $counts; do each "$paper" resnet18 unet all $images; done
}

fig4() {  # frozen encoders, by learning rate; 1e-4 is that of the other tables
  local rate
  each "$paper calibrated" "resnet18 resnet50" unet frozen 16
  for rate in 1e-5 1e-3 1e-2; do
    each "$paper calibrated" "resnet18 resnet50" unet frozen 16 lr$rate --learning_rate $rate
  done
}

fig5() {  # pre-trained at one size, fine-tuned at another, both ways
  each "imagenet depth large" resnet18 unet all 16
  local tuning_size=$large
  each "imagenet depth large" resnet18 unet all 16 large
}

fig6() {  # activations of a shallow layer, each beside the segmentation
  each "$paper" resnet18 unet all 16
  picture gradcam fig6.png resnet18 "$paper"
}

fig7() {  # depth helps, flow hurts
  each "none flow-encoder flowimagenet-encoder depthrand depth" resnet18 unet all 16
  each "none calibrated flow-encoder flowimagenet-encoder depthrand depth" resnet18 unet frozen 16
  job evaluate.py grid "$frames"/00000000{10,11,12,13}."$suffix" --output "$RUNS/fig7.png" \
    --weights "$RUNS/flow_resnet18" "$(weights_of depthrand resnet18)"
}

fig8() {  # NYU-v2: raw scenes with Kinect depth (407,024 frames, 10 epochs), then the 795 labelled images
  local prefix=nyu_ main=depth size="--height 384 --width 448"
  local video=(--data nyu --data_path "$NYU_RAW") labels=(--data nyu --data_path "$NYU")
  local depth="--steps 508800 --batch_size 8 --min_depth 0.1 --max_depth 10"
  depth+=" --learning_rate 1e-4 --learning_rate_drop 0.5 --learning_rate_factor 0.5"
  local batch=16 tuning="--steps 20000 --learning_rate 1e-4 --eval_every 1000"
  each "none imagenet depth" "resnet18 resnet50" unet all all
}

release() {  # what the authors' release does otherwise, and Monodepth2's start and border
  each "none imagenet depthrand parity" resnet18 unet all 16
  each "none imagenet depthrand" resnet18 unet all 16 twice --normalize_twice
  each "none calibrated imagenet depthrand" resnet18 unet frozen 16
  each "none imagenet depthrand" resnet18 unet all 16 batchnorm --freeze_batch_norm_only
}

real() {  # the claim: video of one KITTI drive, few labels of KITTI and CamVid, a pre-training for each seed
  local RUNS=$REAL CACHE=$REAL/cache PUBLISHED="" seeds=$SEEDS SEEDS seed_of_video=yes main=stereo
  local video=(--data kitti --data_path "$KITTI_RAW" --drives 2011_09_26_drive_0013_sync)
  local size camvid_size depth flow reconstruction batch=${BATCH:-4} tuning
  [[ $batch =~ ^[0-9]+$ ]] || fail "BATCH=$batch is no number of images"
  size=$(size_options ${SIZE:-64 192})
  camvid_size=$(size_options ${CAMVID_SIZE:-96 128})
  depth="--steps ${STEPS:-1000} --batch_size $batch --learning_rate ${RATE:-1e-3} --num_workers 0"
  flow=$depth reconstruction=$depth
  tuning="--steps ${TUNING_STEPS:-300} --learning_rate ${TUNING_RATE:-1e-3} --num_workers 0"
  tuning+=" --eval_every ${TUNING_STEPS:-300}"
  # the primary contrasts first: frozen, encoder only
  for SEEDS in $seeds; do
    on_real_labels "calibrated shuffled-encoder lidar-encoder flow-encoder depthrand-encoder" efficientnet_lite0 frozen
    on_real_labels "imagenet depth-encoder" efficientnet_lite0 frozen
  done
  for SEEDS in $seeds; do
    depth_quality "shuffled lidar depthrand depth" efficientnet_lite0
    on_real_labels "none reconstruction-encoder release-encoder" efficientnet_lite0 frozen
    on_real_labels "none imagenet shuffled-encoder lidar-encoder flow-encoder" efficientnet_lite0 all
    on_real_labels "depthrand-encoder depth-encoder reconstruction-encoder release-encoder" efficientnet_lite0 all
  done
  for SEEDS in $seeds; do
    on_real_labels "calibrated shuffled-encoder lidar-encoder flow-encoder depthrand-encoder" resnet18 frozen
    depth_quality "shuffled lidar depthrand" resnet18
  done
  for SEEDS in $seeds; do  # whole networks; the release hands over the encoder alone, and so does flow
    on_real_labels "shuffled lidar depthrand depth reconstruction" efficientnet_lite0 frozen
    on_real_labels "shuffled lidar depthrand depth reconstruction" efficientnet_lite0 all
  done
  for SEEDS in $seeds; do
    on_real_labels "none reconstruction-encoder release-encoder" resnet18 frozen
    on_real_labels "none shuffled-encoder lidar-encoder flow-encoder" resnet18 all
    on_real_labels "depthrand-encoder reconstruction-encoder release-encoder" resnet18 all
    on_real_labels "shuffled lidar depthrand reconstruction" resnet18 frozen
    on_real_labels "shuffled lidar depthrand reconstruction" resnet18 all
  done
}

everything="core table1 table2 table3 table4 table5 table6 fig2 fig3 fig4 fig5 fig6 fig7 fig8 release real"

# ------------------------------------------------------------------------------------------- jobs

# job SCRIPT OPTION…: one line, a complete command
job() {
  printf '%q ' "$PYTHON" "$@"
  echo
}

# what a kind of pre-training adds to the data, the encoder and the size
pretraining() {
  case $1 in
    depthrand) echo "--supervision $main $depth" ;;
    depth | large) echo "--supervision $main --init imagenet $depth" ;;
    cropped) echo "--supervision $main --init imagenet ${depth/--crop 512 512/--crop 256 256}" ;;
    parity) echo "--supervision $main --monodepth2 $depth" ;;
    mono | stereo) echo "--supervision $1 $depth" ;;
    lidar) echo "--supervision depth $depth" ;;
    shuffled) echo "--supervision depth --shuffle_depth $SEEDS $depth" ;;
    flow) echo "--task flow $flow" ;;
    flowimagenet) echo "--task flow --init imagenet $flow" ;;
    reconstruction) echo "--task reconstruction $reconstruction" ;;
    release) echo "--task reconstruction --reconstruction release $reconstruction" ;;
  esac
}

# Monodepth2's published weights of a pre-training, nothing where there are none
published() {
  case ${PUBLISHED:+$prefix$1_$2} in
    depth_resnet18) echo mono+stereo_640x192 ;;
    depthrand_resnet18) echo mono+stereo_no_pt_640x192 ;;
    mono_resnet18) echo mono_no_pt_640x192 ;;
    stereo_resnet18) echo stereo_no_pt_640x192 ;;
    large_resnet18) echo mono+stereo_1024x320 ;;
    depth_resnet50) echo mono_resnet50_640x192 ;;
    depthrand_resnet50) echo mono_resnet50_no_pt_640x192 ;;
  esac
}

# weights that others have published under these names
downloaded() {
  case $1 in
    coco) echo deeplabv3_resnet50_coco-cd0a2569.pth ;;
    dino) echo dino_resnet50_pretrain.pth ;;
    moco) echo moco_v2_800ep_pretrain.pth.tar ;;
    vit) echo vit_large_patch16_384.augreg_in21k_ft_in1k.safetensors ;;
    dpt) echo dpt_large-midas-2f21e586.pt ;;
    mae) echo mae_pretrain_vit_large.pth ;;
    dinov2) echo dinov2_vitl14_pretrain.pth ;;
    depthanything) echo depth_anything_vitl14.pth ;;
    *) published "$1" "$2" ;;
  esac
}

# pretrain KIND ENCODER
pretrain() {
  local name=$prefix$1_$2${seed_of_video:+_seed$SEEDS} input=$size
  [ "$1" != large ] || input=$large
  job train_depth.py --name "$name" --log_dir "$RUNS" "${video[@]}" --encoder "$2" $input $(pretraining "$1") \
    --seed "$([ -n "$seed_of_video" ] && echo "$SEEDS" || echo 0)" ${CACHE:+--cache "$CACHE"}
}

# weights_of KIND ENCODER: the run of a pre-training, or what others have published
weights_of() {
  local file
  file=$(downloaded "$1" "$2")
  [ -n "$file" ] && echo "$WEIGHTS/$file" || echo "$RUNS/$prefix$1_$2${seed_of_video:+_seed$SEEDS}"
}

# finetune PRE-TRAINING ENCODER ARCHITECTURE all|frozen IMAGES [TAG OPTION…]
finetune() {
  local init=$1 kind=${1%-*} encoder=$2 arch=$3 tuned=$4 images=$5 tag=${6:+_$6} seed from options=()
  shift $(($# < 6 ? $# : 6))
  case $kind in
    none | imagenet) from=$kind ;;
    calibrated) from=none options+=(--calibrate_batch_norm) ;;
    *)
      [ -n "$(downloaded "$kind" "$encoder")" ] || pretrain "$kind" "$encoder"
      from=$(weights_of "$kind" "$encoder")
      ;;
  esac
  case $init-$arch in  # another decoder than that of the pre-training starts from random weights
    none-* | imagenet-* | calibrated-*) ;;
    *-encoder-* | coco-* | dino-* | moco-* | *-dpt | *-linear) options+=(--init_parts encoder) ;;
    *-deeplabv3) [ "$prefix" = cityscapes_ ] || options+=(--init_parts encoder) ;;
  esac
  [ "$tuned" = all ] || options+=(--freeze_encoder)
  [ "$images" = all ] || options+=(--train_size "$images")
  options+=(--batch_size "$([ "$images" != all ] && [ "$images" -lt $batch ] && echo "$images" || echo $batch)")
  for seed in $SEEDS; do
    job train_seg.py --name "$prefix${of}seg_${init}_${encoder}_${arch}_${tuned}_n$images${tag}_seed$seed" \
      --log_dir "$RUNS" "${labels[@]}" --encoder "$encoder" --arch "$arch" --init "$from" \
      --split_seed "$seed" --seed "$seed" ${tuning_size:-$size} $tuning "${options[@]}" "$@"
  done
}

each() {
  local init encoder
  for encoder in $2; do
    for init in $1; do finetune "$init" "$encoder" "${@:3}"; done
  done
}

# on_real_labels "PRE-TRAINING…" ENCODER all|frozen: KITTI's labels without frames of the video, and CamVid's
on_real_labels() {
  local of=kitti_ tuning_size=$size labels=(--data kitti --data_path "$KITTI_LABELS")
  each "$1" "$2" unet "$3" 16 "" --leave_out 000018 000019 000020 000021
  of=camvid_ tuning_size=$camvid_size labels=(--data camvid --data_path "$CAMVID")
  each "$1" "$2" unet "$3" 16
  each "$1" "$2" unet "$3" 64
}

# other_domain NAME ROOT "SIZE" "CROP" STEPS: MAE has patches of 16, the others of 14
other_domain() {
  local prefix=$1_ labels=(--data "$1" --data_path "$2") batch=16 tuning="$recipe" tuning_size init encoder
  for init in mae dinov2 depthanything; do
    encoder=vit_l14 tuning_size="$(size_options $3) --crop $4"
    [ $init != mae ] || encoder=vit_l16 tuning_size=${tuning_size//518/512}
    finetune $init $encoder dpt all all "" --dpt_layers last --steps "$5" \
      --learning_rate 3e-5 --encoder_learning_rate_factor 0.1
    finetune $init $encoder linear frozen all "" --steps "$5" --learning_rate 1e-3
  done
}

size_options() {
  [[ $* =~ ^[0-9]+\ [0-9]+$ ]] || fail "a size is HEIGHT WIDTH, as in SIZE=\"64 192\", not '$*'"
  echo "--height $1 --width $2"
}

# picture COMMAND FILE ENCODER "PRE-TRAINING…": of the first seed's fine-tunings on 16 images
picture() {
  local init weights=()
  for init in $4; do weights+=("$RUNS/seg_${init}_$3_unet_all_n16_seed${SEEDS%% *}"); done
  job evaluate.py "$1" "${labels[@]}" --output "$RUNS/$2" --weights "${weights[@]}"
}

# training_scores "PRE-TRAINING…" REST-OF-NAME: scores on the training images, into each run's folder train
training_scores() {
  local init seed run
  for init in $1; do
    for seed in $SEEDS; do
      run=$RUNS/${prefix}seg_${init}_$2_seed$seed
      job evaluate.py seg --split train "${labels[@]}" --output "$run/train" --weights "$run"
    done
  done
}

# depth_quality "PRE-TRAINING…" ENCODER: errors on the video's LiDAR beside a constant's, into each run's depth.json
depth_quality() {
  local kind run
  for kind in $1; do
    run=$RUNS/${kind}_$2_seed$SEEDS
    job evaluate.py depth "${video[@]}" --frames 0:144 --constant_from 0:144 --scale median \
      --output "$run" --weights "$run"
  done
}

# list NAME… [STAGE]: the jobs, none twice
list() {
  local script="" name
  case ${*: -1} in
    pretraining) script=train_depth.py ;;
    finetuning) script=train_seg.py ;;
    evaluation) script=evaluate.py ;;
  esac
  [ -z "$script" ] || set -- "${@:1:$#-1}"
  [ $# -gt 0 ] || set -- $everything
  for name in "$@"; do
    [[ " $everything " == *" $name "* ]] || fail "'$name' is none of: list $everything"
  done
  for name in "$@"; do $name; done | awk -v script="${script:- }" 'index($0, script) && !seen[$0]++'
}

# ------------------------------------------------------------------------------------------- running

main() {
  if [ "${1:-}" = list ]; then
    list "${@:2}"
    return
  fi
  [ $# -gt 0 ] || set -- core
  local jobs code=0 names="$*"
  jobs=$(list "$@")  # refuses an unknown name
  case " $* " in
    " real ") RUNS=$REAL ;;
    *" real "*) fail "real has runs of its own: give it alone" ;;
  esac
  type -P "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such program"
  case ${*: -1} in
    pretraining | finetuning | evaluation) names=${*:1:$#-1} ;;
  esac
  mkdir -p "$RUNS"
  if [ "$DATA" = synthetic ] && [ "$RUNS" != "$REAL" ] && [ ! -e "$STREET" ]; then
    "$PYTHON" tools/street.py --data_path "$STREET" --preview "$RUNS/street.png"
  fi
  "$PYTHON" tools/run_jobs.py --jobs "$JOBS" <<< "$jobs" || code=$?
  [ $code != 75 ] || exit 75
  "$PYTHON" tools/tables.py --log_dir "$RUNS" --tables ${names:-$everything} --page
  return $code
}

{ main "$@"; exit; }  # read whole: this file may be edited while jobs run
