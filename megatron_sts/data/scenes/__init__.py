"""Scenes: small images composed on the fly from real sprites and real handwriting, with captions and questions.

Must not know tokenizers, models or torch.
"""
