#!/usr/bin/env bash
# Trains the same tiny model dense and with STS, evaluates both and compares them.
#   bash launch/local.sh examples/quickstart [key.path=value ...]
# Arguments go to both trainings. Writes runs/quickstart below the current folder; started again, it goes on where it
# stopped and repeats nothing that is finished.
set -euo pipefail
# shellcheck source=launch/example.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../launch/example.sh"

# What is wrong with the second training is said before the first one runs.
megatron-sts train "$here/config.yaml" "$@" --dry-run >/dev/null

printf '== dense\n'
# The micro-batches with which the dense run was fastest; samples and steps are the same.
megatron-sts train "$here/config.yaml" 'stages.*.vtc=null' 'stages.*.lds=null' stages.finetune.batch.micro_batch_size=16 \
  "$@" --run-dir "$runs/dense"
printf '== STS\n'
megatron-sts train "$here/config.yaml" "$@" --run-dir "$runs/sts"
case " $* " in *" --dry-run "*) exit 0 ;; esac # nothing was trained
megatron-sts report "$runs/dense" "$runs/sts"
