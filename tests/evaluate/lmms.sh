#!/usr/bin/env bash
# The tests that need lmms-eval, which everywhere else are skipped: makes an environment of its own with it (once: several GB,
# minutes) and runs them. Arguments are pytest's, but for a first one --if-installed: does nothing unless the environment is there.
#
#   MEGATRON_STS_LMMS_VENV   folder of the environment (default: .venv-lmms in the checkout)
#   MEGATRON_STS_PYTHON      Python >= 3.12 to make the environment from (default: searched as by tests/run.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD

case ${1:-} in
  -h | --help) printf 'usage: %s [--if-installed] [pytest arguments]\n' "${BASH_SOURCE[0]}"; sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
# shellcheck source=launch/setup.sh
. launch/setup.sh

# The version that the tables of megatron_sts/evaluate/README.md are of.
version=$(sed -n 's/^LMMS_VERSION = "\(.*\)"$/\1/p' tests/evaluate/benchmarks/test_answer_rules.py)
venv=${MEGATRON_STS_LMMS_VENV:-$root/.venv-lmms}
python=$venv/bin/python
has_lmms() { [ "$("$python" -c 'from importlib.metadata import version; print(version("lmms-eval"))' 2>/dev/null)" = "$version" ]; }

if [ "${1:-}" = --if-installed ]; then
  shift
  if ! has_lmms; then
    sts_say "no lmms-eval $version in $venv: its tests are left out; bash tests/evaluate/lmms.sh installs it"
    exit 0
  fi
fi
if ! sts_python_is_new_enough "$python"; then sts_make_venv "$venv"; fi
if ! has_lmms; then sts_say "installing into $venv (the first time: several GB)"; fi
# Not the extra dev: lmms-eval asks for an older wandb.
"$python" -m pip install --disable-pip-version-check --quiet -e "${root}[eval]" "lmms-eval==$version" pytest pytest-timeout pytest-xdist hypothesis

tests=(tests/evaluate/test_lmms.py tests/evaluate/benchmarks/test_lmms_parity.py tests/evaluate/benchmarks/test_answer_rules.py)
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$python" -m pytest "${tests[@]}" "$@"
