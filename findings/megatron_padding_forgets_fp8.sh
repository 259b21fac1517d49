#!/usr/bin/env bash
# Finding: megatron-core's padding for multimodal sequences forgets FP8 as soon as sequence or context parallelism is on.
# Versions: megatron-core 0.19.2, torch 2.14.1.
# Behaviour: context_parallel.get_padding is said to "calculate padding needed for SP, CP, TP comm overlap, and FP8", but FP8 is the last
#   branch of an elif: 1001 tokens become 1008 (a multiple of 16) with FP8 alone, and 1002 with FP8 and sequence parallelism.
# Output: FP8: 1008 tokens
#   FP8 and sequence parallelism over 2 ranks: 1002 tokens
#   MXFP8 and context parallelism over 2 ranks: 1004 tokens
# What to do: pad to the least common multiple of all rules.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-core==0.19.2
cat > finding.py <<'EOF'
from megatron.core.models.multimodal.context_parallel import get_padding

cases = {
    "FP8": dict(cp_size=1, tp_size=1, has_sp=False),
    "FP8 and sequence parallelism over 2 ranks": dict(cp_size=1, tp_size=2, has_sp=True),
    "MXFP8 and context parallelism over 2 ranks": dict(cp_size=2, tp_size=1, has_sp=False, fp8_recipe="mxfp8"),
}
found = {name: 1001 + get_padding(1001, fp8_enabled=True, **case) for name, case in cases.items()}
for name, length in found.items():
    print(f"{name}: {length} tokens")
assert list(found.values()) == [1008, 1002, 1004], "behaves otherwise now"
EOF
python finding.py
