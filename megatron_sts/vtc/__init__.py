"""Visual Token Compressor: which of an image's tokens the language model sees, and at which positions.

Must not know models, megatron, data or the training loop. What is in ``__all__`` is for other people's scripts, and stays (README.md).
"""

from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.positions import position_ids

__all__ = ["compress", "position_ids", "uniform_tokens"]
