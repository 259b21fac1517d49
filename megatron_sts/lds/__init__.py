"""Layer Dynamic Skipper: which decoder layers a step skips, agreed on by every rank.

Must not know models, megatron, data or the training loop.
"""
