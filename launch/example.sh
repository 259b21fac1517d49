# Sourced by an example's run.sh, with its arguments: sets here (its folder) and runs (where it writes, below the current
# folder), answers --help, and ends it where megatron-sts is not on the PATH. Whoever ends run.sh ends what it has started.
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd -P)
runs=runs/$(basename "$here")

case ${1:-} in
  -h | --help) printf 'usage: %s [key.path=value ...] [megatron-sts train options]\n' "${BASH_SOURCE[1]}"; exit 0 ;;
esac
case " $*" in
  *' --run-dir'*)
    printf 'megatron-sts: error: --run-dir: this example writes its runs into %s below the current folder; start it from another folder\n' "$runs" >&2
    exit 2
    ;;
esac
command -v megatron-sts >/dev/null || {
  printf 'megatron-sts: error: not on PATH; start this example with: bash launch/local.sh examples/%s\n' "$(basename "$here")" >&2
  exit 2
}

# Bash looks at signals only once the command that it waits for has ended, but not in `wait`. With job control (set -m) the
# command has a process group of its own, so that Ctrl-C comes to it once, and does not ignore it, as it would without.
megatron-sts() {
  local child status ended=0
  set -m
  command megatron-sts "$@" &
  child=$!
  set +m
  trap "ended=143; kill -TERM $child || :" TERM HUP
  trap "ended=130; kill -INT $child || :" INT
  while
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null # a signal came, and the command may have something to save
  do :; done
  trap - TERM HUP INT
  return "$((status ? status : ended))" # what was just finishing is the last, too: no other command begins
}
