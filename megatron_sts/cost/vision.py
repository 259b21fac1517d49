"""What is kept of images: by autograd in tower and Q-Former, where these learn, and from before a step by the first stage, if a
frozen tower is spread. Torch-free; conventions as in ``cost/activations.py``."""

from __future__ import annotations

from megatron_sts.config.architecture import QFormerConfig, VisionConfig
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import BEFORE_PROJECTOR, TokenCounts
from megatron_sts.cost.flops import planned_load

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


def image_share(num_images: int, rank: int, num_ranks: int) -> range:
    """Which of a copy's images in a step one of its ranks encodes, if the tower is spread: as many as others or one more."""
    return range(num_images * rank // num_ranks, num_images * (rank + 1) // num_ranks)


def images_of_copy(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts) -> int:
    """Images that one copy of the model sees in a step of full rows."""
    return planned_load(resolved, stage, counts).num_images // resolved.data_parallel_size


def features_bytes(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts, images: range | None = None) -> int:
    """Of some of a step's ``images`` (None: all of a copy's), as a spread tower hands them to the first stage, which holds those of all
    micro-batches at once: e d a token; of the kept tokens where nothing that follows sees the others."""
    model, vtc, batch = resolved.config.model, stage.config.vtc, stage.config.batch
    if model.vision is None:
        return 0
    images = range(images_of_copy(resolved, stage, counts)) if images is None else images
    if model.qformer is not None:
        of_image = (model.vision.image_size // model.vision.patch_size) ** 2 + (model.vision.tower != "siglip")
        num_tokens = len(images) * of_image
    elif stage.pictures:
        num_tokens = sum(counts.projected_tokens[image % stage.num_views] for image in images)
    elif vtc is not None and vtc.sampler in BEFORE_PROJECTOR:
        num_tokens = sum(counts.of_image(image % batch.max_images) for image in images)
    else:
        num_tokens = len(images) * stage.visual_tokens_in
    return (4 if resolved.config.precision.params == "fp32" else 2) * num_tokens * model.vision.hidden_size
