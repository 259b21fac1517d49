#!/usr/bin/env bash
# Writes a JSON with pictures, prepares it as shards, and trains on them.
#   bash launch/local.sh examples/llava_json [key.path=value ...]
# Arguments go to the training. Writes runs/llava_json below the current folder; started again, it goes on where it stopped.
set -euo pipefail
# shellcheck source=launch/example.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch/example.sh"

if [ ! -e "$runs/data/samples.json" ]; then python "$here/make_data.py" "$runs/data"; fi
megatron-sts data prepare "$runs/data/samples.json" --images "$runs/data/pictures" --out "$runs/shards"
megatron-sts train "$here/config.yaml" "$@" --run-dir "$runs/train"
megatron-sts report "$runs/train"
