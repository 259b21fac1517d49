"""What autograd keeps of images in tower and Q-Former, where these learn. Torch-free; conventions as in ``cost/activations.py``."""

from __future__ import annotations

from megatron_sts.config.architecture import QFormerConfig, VisionConfig

FP32_BYTES = 4


def tower_bytes(vision: VisionConfig, num_layers: int, element_bytes: int, tp: int, num_images: int) -> int:
    """Of a tower that learns: n images of t patches and class token, hidden size h, MLP size f, a heads.

    Pixels and, in clip, the first norm; a layer: inputs of two norms and of the four matrices, fused QKV, the attention's output
    (also its matrix's input) and log-sum-exp, and the MLP's activation: 4 e t h + 16 t + (4 e t h + 4 t a + 2 e t f) / tp, in clip
    also the sigmoid of quick-GELU, e t f / tp. Of Hugging Face's, which are whole on each rank, an estimate.
    """
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size or 4 * vision.hidden_size
    tokens = num_images * ((vision.image_size // vision.patch_size) ** 2 + (vision.tower != "siglip"))
    tp = 1 if vision.tower == "hf" else tp
    norm = element_bytes * tokens * hidden + 2 * FP32_BYTES * tokens
    of_mlp = (3 if vision.tower == "clip" else 2) * element_bytes * tokens * ffn
    split = 4 * element_bytes * tokens * hidden + FP32_BYTES * tokens * vision.num_attention_heads + of_mlp
    layer = 2 * norm + 2 * element_bytes * tokens * hidden + split // tp
    pixels = element_bytes * num_images * 3 * vision.image_size**2
    return pixels + (norm if vision.tower == "clip" else 0) + num_layers * layer


def qformer_bytes(qformer: QFormerConfig, vision: VisionConfig, element_bytes: int, num_images: int) -> int:
    """Of a Q-Former that learns or passes gradients on: an estimate, not compared with the executed step.

    A layer of q queries: input, QKV, output, and input and output of the norm (7 h), and the MLP's 2 f + 2 h; one that looks at t
    features adds 4 h of queries and 2 t h of keys and values; the features themselves count once.
    """
    hidden, ffn = qformer.hidden_size, qformer.ffn_hidden_size or 4 * qformer.hidden_size
    features = (vision.image_size // vision.patch_size) ** 2 + (vision.tower != "siglip")
    num_looking = -(-qformer.num_layers // qformer.cross_attention_frequency)
    layer = qformer.num_query_tokens * (9 * hidden + 2 * ffn)
    looking = 4 * qformer.num_query_tokens * hidden + 2 * features * hidden
    elements = qformer.num_layers * layer + num_looking * looking + features * vision.hidden_size
    return element_bytes * num_images * elements
