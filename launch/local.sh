#!/usr/bin/env bash
# Runs an example on this machine: launch/local.sh EXAMPLE_DIR [key.path=value ...] [train options]
# Sets itself up on the first start (see launch/setup.sh).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  printf 'usage: %s EXAMPLE_DIR [key.path=value ...] [megatron-sts train options]\n' "${BASH_SOURCE[0]}"
  if compgen -G "$root/examples/*/config.yaml" >/dev/null; then
    printf 'examples:\n'
    for config in "$root"/examples/*/config.yaml; do printf '  examples/%s\n' "$(basename "$(dirname "$config")")"; done
  fi
}

case ${1:-} in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
example=${1%/}
shift
if [ ! -d "$example" ] && [ -d "$root/$example" ]; then example=$root/$example; fi
if [ ! -e "$example/run.sh" ] && [ ! -e "$example/config.yaml" ]; then
  printf 'megatron-sts: error: %s has neither run.sh nor config.yaml; --help lists the examples\n' "$example" >&2
  exit 2
fi

# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"
sts_setup
if [ -e "$example/run.sh" ]; then exec bash "$example/run.sh" "$@"; fi
exec megatron-sts train "$example/config.yaml" "$@"
