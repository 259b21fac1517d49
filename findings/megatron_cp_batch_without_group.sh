#!/usr/bin/env bash
# Finding: megatron-core's get_batch_on_this_cp_rank without cp_group, which is optional, cuts the batch over the whole world.
# Versions: megatron-core 0.19.2, torch 2.14.1.
# Behaviour: with tensor parallelism 2 and context parallelism 2, a rank gets a quarter of the sequence instead of its half, and not
#   the same as its tensor-parallel neighbour; no error. The default None means "the default group" to torch.distributed; earlier
#   versions asked parallel_state for the context-parallel group. (Fake process group: no second process is needed to see it.)
# Output: cp_group=None: [4, 5, 10, 11]
#   cp_group=context parallel: [4, 5, 6, 7, 8, 9, 10, 11]
# What to do: always pass cp_group=parallel_state.get_context_parallel_group().
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-core==0.19.2
cat > finding.py <<'EOF'
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
parallel_state.initialize_model_parallel(
    tensor_model_parallel_size=2, context_parallel_size=2, create_gloo_process_groups=False
)
tokens, found = torch.arange(16)[None], []
for name, group in (("None", None), ("context parallel", parallel_state.get_context_parallel_group())):
    batch = get_batch_on_this_cp_rank({"tokens": tokens.clone(), "cu_seqlens": None}, is_hybrid_cp=False, cp_group=group)
    found.append(batch["tokens"][0].tolist())
    print(f"cp_group={name}: {found[-1]}")
assert found == [[4, 5, 10, 11], [4, 5, 6, 7, 8, 9, 10, 11]], "behaves otherwise now"
EOF
python finding.py
