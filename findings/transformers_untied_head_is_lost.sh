#!/usr/bin/env bash
# Finding: transformers loads a head that differs from its "tied" embedding, and loses it when the vocabulary is resized.
# Versions: transformers 5.24.0, torch 2.14.1.
# Behaviour: where config.json says tie_word_embeddings=true and the file holds a different lm_head, from_pretrained keeps both
#   (with a warning), but the config goes on saying tied. resize_token_embeddings, as for one new token, or tie_weights() then replace the
#   head by the embedding without a word: the old tokens' logits change by more than their size.
# Output: loaded: tied False, config says True
#   after resize_token_embeddings(65): tied True, logits of old tokens moved by 2.2 of the largest
# What to do: set config.tie_word_embeddings=False after loading such a model, and save it so.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 transformers==5.24.0
cat > finding.py <<'EOF'
import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
config = Path("model/config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))


@torch.no_grad()
def state(model):
    return model.lm_head.weight is model.model.embed_tokens.weight, model(torch.arange(10)[None]).logits[..., :64]


model = LlamaForCausalLM.from_pretrained("model")
was_tied, before = state(model)
print(f"loaded: tied {was_tied}, config says {model.config.tie_word_embeddings}")
model.resize_token_embeddings(65, mean_resizing=False)
is_tied, after = state(model)
moved = float((after - before).abs().max() / before.abs().max())
print(f"after resize_token_embeddings(65): tied {is_tied}, logits of old tokens moved by {moved:.1f} of the largest")
assert (was_tied, is_tied) == (False, True) and moved > 0.5, "behaves otherwise now"
EOF
python finding.py
