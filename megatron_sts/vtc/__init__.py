"""Visual Token Compressor: which of an image's tokens the language model sees, and at which positions.

Must not know models, megatron, data or the training loop. What is in ``__all__`` is for other people's scripts, and stays (README.md).
"""

from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.positions import position_ids
from megatron_sts.vtc.uniform import uniform_tokens

__all__ = ["compress", "position_ids", "uniform_tokens"]
