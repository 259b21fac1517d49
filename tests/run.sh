#!/usr/bin/env bash
# All checks: format, lint, types, layering, tests. With arguments: only pytest, with these arguments.
# Sets itself up on the first start (see launch/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
  -h | --help) printf 'usage: %s [pytest arguments]\n' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
# shellcheck source=launch/setup.sh
. launch/setup.sh
sts_setup
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi

# Jobs on a real SLURM, where it can be installed; else these tests are skipped.
bash tests/slurm/cluster.sh install || sts_say "tests/slurm/test_cluster.py is left out, see above"

step() { printf '== %s\n' "$*"; "$@"; }
step ruff format --check .
step ruff check .
step mypy
step lint-imports
# On the CPU, also where there is a GPU: what needs one has a command of its own, tests/gpu/run.sh. Two workers, each with
# whole files, so that what a file's tests share is made once; a core each, and what they start shares it.
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
step python -m pytest tests -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder
