"""Weights in and out: folders of Hugging Face's and megatron-core's, and weights folders. Must not know how a model is trained or computes."""
