#!/usr/bin/env bash
# Finding: torch.save on a full disk does not say that the disk is full.
# Versions: torch 2.14.1.
# Behaviour: its zip writer, which fails again when it is taken down, raises a RuntimeError about positions; the OSError of the write is
#   not what arrives. Who handles a full disk by errno never sees it.
# Output: a path: RuntimeError, names the cause: False
#   a file: RuntimeError, names the cause: False
# What to do: give torch.save a file object whose write() keeps the OSError, and raise that one.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1
cat > finding.py <<'EOF'
import torch


def save(what, target):
    try:
        torch.save(torch.zeros(10_000_000), target)
    except Exception as error:
        names_it = "No space left" in str(error)
        print(f"{what}: {type(error).__name__}, names the cause: {names_it}")
        return type(error), names_it


found = [save("a path", "/dev/full"), save("a file", open("/dev/full", "wb"))]
assert found == [(RuntimeError, False)] * 2, "behaves otherwise now"
EOF
python finding.py
