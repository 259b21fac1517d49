#!/usr/bin/env bash
# Writes a JSON with pictures, prepares it as shards, and trains on them.
#   bash launch/local.sh examples/llava_json [key.path=value ...]
# Arguments go to the training. Writes runs/llava_json below the current folder; started again, it goes on where it stopped.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
runs=runs/llava_json

case ${1:-} in
  -h | --help) printf 'usage: %s [key.path=value ...] [megatron-sts train options]\n' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
command -v megatron-sts >/dev/null || {
  printf 'megatron-sts: error: not on PATH; start this example with: bash launch/local.sh examples/llava_json\n' >&2
  exit 2
}

if [ ! -e "$runs/data/samples.json" ]; then python "$here/make_data.py" "$runs/data"; fi
megatron-sts data prepare "$runs/data/samples.json" --images "$runs/data/pictures" --out "$runs/shards"
megatron-sts train "$here/config.yaml" "$@" --run-dir "$runs/train"
megatron-sts report "$runs/train"
