# Sourced by an example's run.sh, with its arguments: sets here (its folder) and runs (where it writes, below the current
# folder), answers --help, and ends it where megatron-sts is not on the PATH.
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd -P)
runs=runs/$(basename "$here")

case ${1:-} in
  -h | --help) printf 'usage: %s [key.path=value ...] [megatron-sts train options]\n' "${BASH_SOURCE[1]}"; exit 0 ;;
esac
command -v megatron-sts >/dev/null || {
  printf 'megatron-sts: error: not on PATH; start this example with: bash launch/local.sh examples/%s\n' "$(basename "$here")" >&2
  exit 2
}
