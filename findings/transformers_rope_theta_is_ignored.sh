#!/usr/bin/env bash
# Finding: setting config.rope_theta changes nothing in transformers 5, and nothing says so.
# Versions: transformers 5.24.0, torch 2.14.1.
# Behaviour: RoPE's base lives in config.rope_parameters now. The constructor still takes rope_theta=..., but an assignment to the
#   attribute, which was the way in transformers 4, makes a new attribute that no model reads: the frequencies stay. Reading raises.
# Output: LlamaConfig(rope_theta=1e6): lowest frequency 5.6e-06
#   config.rope_theta = 1e6: lowest frequency 3.2e-04 (as without)
# What to do: config.rope_parameters["rope_theta"] = 1e6.
set -euo pipefail
work=$(mktemp -d)
# shellcheck source=findings/venv.bash
. "$(dirname "${BASH_SOURCE[0]}")/venv.bash" torch==2.14.1 transformers==5.24.0
cat > finding.py <<'EOF'
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)


def lowest(config):
    return float(LlamaForCausalLM(config).model.rotary_emb.inv_freq[-1])


given, untouched, assigned = LlamaConfig(**sizes, rope_theta=1e6), LlamaConfig(**sizes), LlamaConfig(**sizes)
can_be_read = hasattr(untouched, "rope_theta")
assigned.rope_theta = 1e6
print(f"LlamaConfig(rope_theta=1e6): lowest frequency {lowest(given):.1e}")
print(f"config.rope_theta = 1e6: lowest frequency {lowest(assigned):.1e} (as without)")
assert lowest(assigned) == lowest(untouched) != lowest(given) and not can_be_read, "behaves otherwise now"
EOF
python finding.py
