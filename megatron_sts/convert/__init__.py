"""Weights in and out: Hugging Face folders and weights folders. Must not know how a model is trained or computes."""
