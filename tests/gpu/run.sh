#!/usr/bin/env bash
# Everything that only a GPU can show: tests, then speed and memory. Prints a report in Markdown, to be committed beside this
# file as reports/<gpu>.md. With arguments: benchmarks with these arguments (see tools/bench_gpu.py --help).
#
#   PYTHON           the interpreter that has megatron-sts, torch for CUDA and (for FP8) Transformer Engine (default: python)
#   REPORT           where the report goes as well (default: tests/gpu/reports/<gpu>.md)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case ${1:-} in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
PYTHON=${PYTHON:-python}
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 1
if [ -z "$gpu" ]; then
  printf 'tests/gpu/run.sh: torch in %s sees no CUDA device; nothing was run\n' "$PYTHON" >&2
  exit 1
fi
report=${REPORT:-tests/gpu/reports/$(printf '%s' "$gpu" | tr -c 'A-Za-z0-9\n' '-' | tr 'A-Z' 'a-z').md}
mkdir -p "$(dirname "$report")"
version=$(git describe --always --dirty 2>/dev/null) # before the report changes
status=0

section() { # title, command...: what it printed, in a code block
  local title=$1 started=$SECONDS code
  shift
  printf '\n## %s\n\n`%s`\n\n```\n' "$title" "${*#"$PYTHON"}"
  "$@" 2>&1
  code=$?
  printf '```\nExit status %d after %d s.\n' "$code" "$((SECONDS - started))"
  [ "$code" -eq 0 ] || status=1
}

{
  printf '# %s\n\nmegatron-sts %s, %s (UTC).\n' "$gpu" "$version" "$(date -u +%F)"
  section Environment "$PYTHON" -m megatron_sts doctor
  section Tests "$PYTHON" -m pytest tests/gpu -q -rs -s -W ignore --color=no --tb=short -p no:logging
  section Benchmarks "$PYTHON" tools/bench_gpu.py "$@"
  exit "$status"
} | tee "$report.partial"
status=${PIPESTATUS[0]}
mv "$report.partial" "$report"
exit "$status"
