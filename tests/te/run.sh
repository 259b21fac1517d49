#!/usr/bin/env bash
# FP8 with the real Transformer Engine on a machine without GPU: makes an environment of its own, builds Transformer Engine's
# binding for torch there (once: 12 to 15 minutes on 2 cores) and runs the tests of this folder, which no other command
# collects. What ran goes into tests/te/last_run.log. Arguments are pytest's, but for a first one --if-built: does nothing
# unless the binding was built before.
#
#   MEGATRON_STS_TE_VENV   folder of the environment (default: .venv-te in the checkout)
#   MEGATRON_STS_TE_CACHE  folder of built wheels (default: megatron-sts/te in the user's cache folder)
#   MEGATRON_STS_PYTHON    Python >= 3.12 to make the environment from (default: searched as by tests/run.sh)
#   TE_VERSION             of Transformer Engine (default: 2.20.2)
#   TORCH_VERSION          of torch (default: 2.11.0). A wheel fits only the torch that it was built with: a pinned one keeps
#                          fitting while torch moves on. megatron-sts itself takes newer ones.
#   CUDA_HOME              CUDA 13 toolkit, whose headers the build needs (default: /usr/local/cuda)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD

case ${1:-} in
  -h | --help) printf 'usage: %s [pytest arguments]\n' "${BASH_SOURCE[0]}"; sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
# shellcheck source=launch/setup.sh
. launch/setup.sh

TE_VERSION=${TE_VERSION:-2.20.2}
TORCH_VERSION=${TORCH_VERSION:-2.11.0}
venv=${MEGATRON_STS_TE_VENV:-$root/.venv-te}
cache=${MEGATRON_STS_TE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/megatron-sts/te}/te-$TE_VERSION-torch-$TORCH_VERSION
python=$venv/bin/python

if [ "${1:-}" = --if-built ]; then
  shift
  if ! compgen -G "$cache/transformer_engine_torch-$TE_VERSION-*.whl" >/dev/null; then
    sts_say "no transformer-engine-torch $TE_VERSION for torch $TORCH_VERSION in $cache: its tests are left out"
    exit 0
  fi
fi

install() { "$python" -m pip install --disable-pip-version-check --quiet "$@"; }

# Prints folders of headers for the compiler's search path; fails when CUDA's are nowhere. The wheels that torch brings along
# have most of them, but not crt/ and nv/target, which a toolkit has, or the wheels named below.
cuda_headers() {
  local folder folders=("${CUDA_HOME:-/usr/local/cuda}/include" "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/include")
  for folder in "${folders[@]}"; do
    if [ -e "$folder/cuda_runtime.h" ] && [ -e "$folder/crt/host_defines.h" ]; then printf '%s\n' "$folder"; return; fi
  done
  sts_say "error: CUDA's headers (cuda_runtime.h, crt/host_defines.h) are neither in \$CUDA_HOME/include nor in the environment's" \
    "nvidia wheels; set CUDA_HOME to a CUDA 13 toolkit, or: $python -m pip install nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-nvcc"
  return 1
}

wheel() { compgen -G "$cache/transformer_engine_torch-$TE_VERSION-$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl" | head -1; }

build_wheel() {
  local headers new
  headers=$(cuda_headers) || return 1
  command -v c++ >/dev/null || { sts_say "error: building transformer-engine-torch needs a C++ compiler"; return 1; }
  sts_say "building transformer-engine-torch $TE_VERSION for torch $TORCH_VERSION (once, 12 to 15 minutes on 2 cores)"
  mkdir -p "$cache"
  new=$(mktemp -d "$cache/new.XXXXXX")
  # shellcheck disable=SC2064 # the name as it is now
  trap "rm -rf '$new'" EXIT
  install setuptools wheel pybind11 ninja cmake packaging nvidia-cudnn-frontend
  PATH=$venv/bin:$PATH CUDA_HOME=$(dirname "$headers") CPATH=$headers${CPATH:+:$CPATH} MAX_JOBS=${MAX_JOBS:-2} \
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 \
    "$python" -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --no-binary transformer-engine-torch \
    -w "$new" "transformer-engine-torch==$TE_VERSION" || { sts_say "error: the build failed (see above)"; return 1; }
  mv "$new"/*.whl "$cache" # only a finished wheel is ever found
}

prepare() {
  if ! sts_python_is_new_enough "$python"; then sts_make_venv "$venv"; fi
  sts_say "installing into $venv (the first time: several GB)"
  install "torch==$TORCH_VERSION"
  install "transformer-engine-cu13==$TE_VERSION" "transformer-engine==$TE_VERSION"
  if [ -n "$(wheel)" ]; then binding="from the cache"; else binding="built by this run"; build_wheel; fi
  install "$(wheel)"
  install -e "${root}[dev]" "torch==$TORCH_VERSION"
}

environment() {
  local changed=
  git diff --quiet HEAD -- . ':!tests/te/last_run.log' || changed=" with changes"
  printf 'megatron-sts %s%s, %s (UTC)\n' "$(git rev-parse --short HEAD)" "$changed" "$(date -u +%F)"
  printf 'transformer-engine-torch: %s\n' "$binding"
  "$python" - <<'EOF'
import importlib.metadata as metadata, os, platform
print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores, no GPU used")
names = ["torch", "transformer-engine", "transformer-engine-cu13", "transformer-engine-torch", "megatron-core", "torchao", "numpy"]
print(", ".join(f"{name} {metadata.version(name)}" for name in names))
EOF
}

prepare
{
  environment
  MEGATRON_STS_TE_JOB=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' \
    "$python" -m pytest tests/te -v -s --no-header --color=no -W ignore "$@" 2>&1
} | sed "s#$venv#VENV#g; s#$root/##g; s#${HOME:-/root}#HOME#g" | tee tests/te/last_run.log
