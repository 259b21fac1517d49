"""Visual Token Compressor: which of an image's tokens the language model sees, and at which positions.

Must not know models, megatron, data or the training loop.
"""
