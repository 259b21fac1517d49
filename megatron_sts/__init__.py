"""Train multimodal LLMs on megatron-core with the Sparse Training Scheme. Start reading at ``cli.py``."""

__version__ = "0.1.0"
