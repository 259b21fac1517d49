#!/usr/bin/env bash
# Trains the same tiny model dense and with STS, evaluates both and compares them.
#   bash launch/local.sh examples/quickstart [key.path=value ...]
# Arguments go to both trainings. Writes runs/quickstart below the current folder; started again, it goes on where it
# stopped and repeats nothing that is finished.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
runs=runs/quickstart

case ${1:-} in
  -h | --help) printf 'usage: %s [key.path=value ...] [megatron-sts train options]\n' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
command -v megatron-sts >/dev/null || {
  printf 'megatron-sts: error: not on PATH; start this example with: bash launch/local.sh examples/quickstart\n' >&2
  exit 2
}

printf '== dense\n'
megatron-sts train "$here/config.yaml" 'stages.*.vtc=null' 'stages.*.lds=null' "$@" --run-dir "$runs/dense"
printf '== STS\n'
megatron-sts train "$here/config.yaml" "$@" --run-dir "$runs/sts"
megatron-sts report "$runs/dense" "$runs/sts"
