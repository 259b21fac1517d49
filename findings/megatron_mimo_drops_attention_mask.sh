#!/usr/bin/env bash
# Finding: a MimoModel whose modules share their ranks takes an attention mask, and does not hand it to its language model.
# Versions: megatron-core 0.19.2, torch 2.14.1.
# Behaviour: MimoModel.forward documents attention_mask [b, s]. Without a module_to_grid_map (modules colocated, the default) the language model is
#   called with attention_mask=None, whatever was given: no error, no warning, and tokens that the mask hides, as padding, are attended to.
# Output: given: a mask [1, 4] that hides 2 tokens
#   language model got: None
# What to do: mask in the language model's own way (a causal mask, and a loss mask for padding), or pack rows (packing_kwargs).
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 megatron-core==0.19.2
cat > finding.py <<'PY'
import torch
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class Language(torch.nn.Module):
    """Embeds tokens, and notes with which mask it is called."""

    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(8, config.hidden_size)

    def embedding(self, input_ids, position_ids=None):
        return self.table(input_ids).transpose(0, 1)  # [s, b, h]

    def forward(self, decoder_input, attention_mask, **others):
        self.got = attention_mask
        return decoder_input


config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
model = MimoModel(MimoModelConfig(language_model_spec=ModuleSpec(module=Language, params={"config": config})))
tokens = torch.tensor([[1, 2, 0, 0]])
mask = tokens > 0
model(tokens, torch.arange(4)[None], attention_mask=mask)
print(f"given: a mask {list(mask.shape)} that hides {int((~mask).sum())} tokens")
print(f"language model got: {model.language_model.got}")
assert model.language_model.got is None, "behaves otherwise now"
PY
python finding.py
