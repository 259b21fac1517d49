#!/usr/bin/env bash
# Finding: in transformers a gap in position_ids, without an attention_mask, cuts the sequence in two, depending on use_cache.
# Versions: transformers 5.24.0, torch 2.14.1.
# Behaviour: positions 0-3 and 10-13 (as when tokens between were left out) are taken for two packed rows, so that the second half does
#   not see the first, if no attention_mask is given and no cache is used, as in training with gradient checkpointing. With use_cache=True
#   (the default) or a mask of ones the same call attends across the gap. Gradients of the first half's tokens are then exactly zero.
# Output: use_cache=True, no mask: second half sees the first: True
#   use_cache=False, mask of ones: second half sees the first: True
#   use_cache=False, no mask: second half sees the first: False
# What to do: pass attention_mask=ones wherever position_ids are not consecutive.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 transformers==5.24.0
cat > finding.py <<'EOF'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes))
positions, ones = torch.tensor([[0, 1, 2, 3, 10, 11, 12, 13]]), torch.ones(1, 8, dtype=torch.long)
found = []
for use_cache, mask in ((True, None), (False, ones), (False, None)):
    embedded = model.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=use_cache).logits
    logits[:, 4:].square().sum().backward()
    found.append(bool(embedded.grad[:, :4].abs().max() > 0))
    words = "no mask" if mask is None else "mask of ones"
    print(f"use_cache={use_cache}, {words}: second half sees the first: {found[-1]}")
assert found == [True, True, False], "behaves otherwise now"
EOF
python finding.py
