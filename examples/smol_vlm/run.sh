#!/usr/bin/env bash
# Teaches SmolLM2-135M to see: fetches it, converts it, trains it in three stages, evaluates, exports, and asks the export.
#   bash launch/local.sh examples/smol_vlm [key.path=value ...]
# Arguments go to the training. Writes runs/smol_vlm below the current folder; started again, it goes on where it stopped.
set -euo pipefail
# shellcheck source=launch/example.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch/example.sh"

[ -d "$runs/smollm2" ] || bash "$here/fetch.sh" "$runs/smollm2"
megatron-sts convert hf-to-sts --hf "$runs/smollm2" --sts "$runs/weights"
megatron-sts verify --hf "$runs/smollm2" --sts "$runs/weights"
megatron-sts train "$here/config.yaml" "$@" --run-dir "$runs/train"
megatron-sts report "$runs/train"
megatron-sts convert sts-to-hf --sts "$runs/train" --hf "$runs/hf"
python "$here/chat.py" "$runs/hf"
