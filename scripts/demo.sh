#!/usr/bin/env bash
# The whole thing in one command: sets up .venv, writes a sample data set, trains a small SegNet on the best device
# there is, evaluates it, segments the validation images. Everything lands in runs/demo; a second call starts anew.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
environment ""
segnet=.venv/bin/segnet
run=runs/demo
data=runs/demo-data

$segnet data sample $data
rm -rf $run
$segnet train --data $data --out $run --config segnet_scratch/recipes/demo.toml
$segnet eval $run/best.safetensors --data $data --json $run/eval.json
$segnet predict $run/best.safetensors $(sed -n '1,6s|.*|'$data'/JPEGImages/&.jpg|p' $data/ImageSets/Segmentation/val.txt) \
    --out $run/predictions

echo
echo "scores:   $run/eval.json"
echo "losses:   $run/metrics.jsonl"
echo "pictures: $run/predictions/*_overlay.png"
