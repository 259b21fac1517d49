# shellcheck shell=bash
# Sourced by launch/local.sh and tests/run.sh. Defines sts_setup, which makes a virtual environment with megatron-sts in
# it and puts its bin/ first on PATH. When setup.cfg and pyproject.toml are unchanged since the last time, it does nothing.
#
#   MEGATRON_STS_VENV     folder of the environment (default: .venv in the checkout)
#   MEGATRON_STS_PYTHON   Python >= 3.12 to make it from (default: searched on PATH, in pyenv and through uv)

sts_say() { printf 'megatron-sts: %s\n' "$*" >&2; }

# Runs the candidate: a name on PATH proves nothing (pyenv's shims exist for versions that are not selected).
sts_python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
sts_python_can_make_venv() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }

sts_python_candidates() {
  local name path
  for name in python3.12 python3.13 python3.14 python3 python; do
    while IFS= read -r path; do printf '%s\n' "$path"; done < <(type -aP "$name" || true)
  done
  for path in "${PYENV_ROOT:-${HOME:-/root}/.pyenv}"/versions/*/bin/python3.1[2-9]; do
    if [ -x "$path" ]; then printf '%s\n' "$path"; fi
  done
  if command -v uv >/dev/null; then uv python find '>=3.12' 2>/dev/null || true; fi
}

# Prints a Python >= 3.12 that can make an environment; fails when there is none.
sts_find_python() {
  local candidate
  while IFS= read -r candidate; do
    if sts_python_is_new_enough "$candidate" && { sts_python_can_make_venv "$candidate" || command -v uv >/dev/null; }; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done < <(sts_python_candidates)
  return 1
}

# The last resort on a bare Debian or Ubuntu where we are root.
sts_apt_python() {
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  sts_say "no Python >= 3.12 that can make environments; asking apt-get for one"
  apt-get update -qq >&2 || return 1
  local version
  for version in 3.12 3.13 3.14; do
    if apt-cache show "python$version-venv" >/dev/null 2>&1; then
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$version" "python$version-venv" >&2
      return
    fi
  done
  return 1
}

sts_make_venv() {
  local venv=$1 python=${MEGATRON_STS_PYTHON:-}
  if [ -n "$python" ]; then
    sts_python_is_new_enough "$python" || { sts_say "error: MEGATRON_STS_PYTHON=$python is not a working Python >= 3.12"; return 1; }
  elif ! python=$(sts_find_python); then
    if command -v uv >/dev/null; then
      python='>=3.12' # uv fetches one
    elif ! { sts_apt_python && python=$(sts_find_python); }; then
      sts_say "error: needs Python >= 3.12 with venv; install one (python3.12 and python3.12-venv, pyenv or uv) or set MEGATRON_STS_PYTHON"
      return 1
    fi
  fi
  sts_say "making $venv with $python"
  if [ -x "$python" ] || command -v "$python" >/dev/null; then
    if sts_python_can_make_venv "$python"; then
      "$python" -m venv --clear "$venv" && return
      sts_say "error: $python -m venv $venv failed"
      return 1
    fi
  fi
  command -v uv >/dev/null || { sts_say "error: $python lacks venv; install python3-venv or uv"; return 1; }
  uv venv --quiet --seed --clear --python "$python" "$venv"
}

# Everything a ready environment depends on, as one line.
sts_fingerprint() { { printf '%s\n' "$1"; cat "$1/setup.cfg" "$1/pyproject.toml"; } | cksum; }

sts_is_ready() { [ -x "$2/bin/python" ] && [ "$(cat "$2/.megatron-sts" 2>/dev/null)" = "$(sts_fingerprint "$1")" ]; }

sts_install() {
  local root=$1 venv=$2 quiet=()
  if sts_is_ready "$root" "$venv"; then return 0; fi # another start finished it while we waited
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    sts_say "error: $venv exists and is not a virtual environment; set MEGATRON_STS_VENV to another folder"
    return 1
  fi
  # A start that was cut off leaves an environment without a working pip: make it anew. A working one is completed.
  if ! { sts_python_is_new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    sts_make_venv "$venv" || return 1
  fi
  sts_say "installing megatron-sts and what it needs into $venv (the first time: some 6 GB, five to ten minutes)"
  [ -t 2 ] || quiet=(--quiet)
  "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} -e "${root}[dev]" >&2 || {
    sts_say "error: the installation failed (see above); start again to resume it"
    return 1
  }
  # A new file in the old one's place: a copy of the environment may share its files by hard links.
  sts_fingerprint "$root" >"$venv/.megatron-sts.new" || return 1
  mv -f "$venv/.megatron-sts.new" "$venv/.megatron-sts" || return 1
  sts_say "ready"
}

sts_setup() {
  local root venv
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
  venv=${MEGATRON_STS_VENV:-$root/.venv}
  mkdir -p "$(dirname "$venv")"
  venv=$(cd "$(dirname "$venv")" && pwd -P)/$(basename "$venv")
  if ! sts_is_ready "$root" "$venv"; then
    # One start installs, others wait for it. The lock lies beside the folder, which may be made anew.
    (
      if command -v flock >/dev/null; then
        flock --nonblock 9 || { sts_say "waiting for another start that is installing into $venv"; flock 9; }
      fi
      sts_install "$root" "$venv" 9>&-
    ) 9>"$venv.lock" || return 1
  fi
  export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
  unset PYTHONHOME
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  sts_say "error: $0 only defines sts_setup for scripts that source it; run launch/local.sh or tests/run.sh, which make the environment"
  exit 2
fi
