#!/usr/bin/env bash
# Half an hour on a cluster, and a page to send back: runs/acceptance/acceptance.md. From the checkout, where jobs are submitted:
#   launch/slurm/acceptance.sh [--nodes 2] [--gpus-per-node 8] [--out DIR] [options of `megatron-sts launch slurm`]
# Real jobs: PP 2 x VPP 2 over the nodes, rounds skipped, torchrun and srun ranks, USR1, requeue, scancel, resume, step time
# against dense, FP8 where Transformer Engine is installed. --gpus-per-node 0: the same on CPUs, with a tiny model.
#
#   STS_PYTHON   Python with megatron-sts in it (default: .venv/bin/python of the checkout)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
case ${1:-} in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
exec "${STS_PYTHON:-$root/.venv/bin/python}" "$root/tools/slurm_acceptance.py" "$@"
