"""What the first and the last pipeline rank compute besides decoder layers: vision tower, projector, embedding; head and loss."""

from __future__ import annotations

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.tower import IMAGES_AT_ONCE
from megatron_sts.cost.flops import TokenLoad, forward_flops
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.timing.collectives import all_reduce_s, gather_s, send_s
from megatron_sts.plan.timing.decoder import added_bytes, summed_bytes, widths
from megatron_sts.plan.timing.kernels import attention_s, gemm_s, memory_s
from megatron_sts.plan.timing.passes import Passes, Spent
from megatron_sts.plan.timing.workload import Workload

QFORMER_SHARE = 0.5
"""Of the sustained rate, in a Q-Former's small products: an estimate, nobody measured it here."""


def first_rank(hardware: Hardware, workload: Workload) -> Passes:
    """Everything before the decoder, for one micro-batch. Context-parallel ranks share out the tower by whole images; each projects all."""
    return _embedding(hardware, workload) + _vision(hardware, workload) + _projector(hardware, workload)


def last_rank(hardware: Hardware, workload: Workload) -> Passes:
    """Final norm, head and loss of one micro-batch; in bf16 whatever the layers multiply."""
    device, tokens, hidden = hardware.device, workload.tokens, workload.model.language.hidden_size
    columns = workload.model.language.vocab_size / workload.tensor_parallel_size
    group, stream = workload.groups.tensor, 2 * tokens * hidden
    loss_bytes = 4 * workload.assumptions.cross_entropy_passes * tokens * columns
    gathers = gather_s(hardware, group, stream) if workload.sequence_parallel else 0.0
    maxima = all_reduce_s(hardware, group, 4 * tokens) * 3  # of the softmax: its maximum, its sum, the label's logit
    forward = Spent(
        gemm=gemm_s(device, tokens, hidden, columns, "bf16"),
        memory=memory_s(device, [4 * hidden * workload.tokens_outside, loss_bytes / 2]),
        tensor=gathers + maxima,
    )
    if not workload.gradient_passes:
        return Passes(forward)
    backward = Spent(
        gemm=gemm_s(device, tokens, columns, hidden, "bf16"),
        memory=memory_s(device, [6 * hidden * workload.tokens_outside, loss_bytes / 2]),
        tensor=gathers,
    )
    return Passes(forward, backward + head_weight_gradient(hardware, workload) * (1 - deferred_share(workload)))


def head_weight_gradient(hardware: Hardware, workload: Workload) -> Spent:
    """Of one micro-batch."""
    if not workload.trains("language"):
        return Spent()
    device, hidden = hardware.device, workload.model.language.hidden_size
    columns = workload.model.language.vocab_size / workload.tensor_parallel_size
    fused = workload.assumptions.fused_gradient_accumulation
    output_bytes = summed_bytes(workload) if fused else 2
    return Spent(
        gemm=gemm_s(device, columns, workload.tokens, hidden, "bf16", output_bytes=output_bytes),
        memory=memory_s(device, [0 if fused else added_bytes(workload) * columns * hidden]),
    )


def deferred_share(workload: Workload) -> float:
    """Of the micro-batches, those whose weight gradient of the head is computed at the end of the step."""
    return min(workload.assumptions.deferred_head_gradients / workload.num_microbatches, 1)


def _embedding(hardware: Hardware, workload: Workload) -> Passes:
    """Rows are looked up on the rank that has them and summed over tensor-parallel ranks; the gradient is a dense matrix.
    Where images are merged in, context-parallel ranks see whole rows."""
    hidden, group = workload.model.language.hidden_size, workload.groups.tensor
    tokens = workload.tokens * (1 if workload.model.vision is None else workload.context_parallel_size)
    stream = 2 * tokens * hidden
    summed = gather_s if workload.sequence_parallel else all_reduce_s
    forward = Spent(memory=memory_s(hardware.device, [2 * stream]), tensor=summed(hardware, group, stream))
    if not workload.trains("language"):
        return Passes(forward)
    table = workload.model.language.vocab_size * hidden / workload.tensor_parallel_size
    gathered = gather_s(hardware, group, stream) if workload.sequence_parallel else 0.0
    return Passes(
        forward,
        Spent(
            memory=memory_s(hardware.device, [2 * stream + 2 * table, added_bytes(workload) * table]), tensor=gathered
        ),
    )


def before_passes(hardware: Hardware, workload: Workload) -> Spent:
    """What a rank does before a step's first pass, where the tower is spread: its share of the images, and to wait for the features."""
    vision = workload.model.vision
    num_images = workload.num_microbatches * workload.micro_batch_size * workload.num_images
    if not workload.spreads_vision or vision is None or not num_images:
        return Spent()
    share = -(-num_images // workload.model_parallel_size)
    tower = _tower(hardware, workload, vision, share)
    launched = tower.forward_launch_s * -(-share // IMAGES_AT_ONCE)
    tokens: float = (vision.image_size // vision.patch_size) ** 2 + (vision.tower != "siglip")
    if workload.model.qformer is None:
        tokens = workload.num_projected_tokens / workload.num_images
    group = workload.groups.pipeline if workload.pipeline_parallel_size > 1 else workload.groups.context
    group = group if group.size > 1 else workload.groups.tensor
    sent = send_s(hardware, group, 2 * (num_images - share) * tokens * vision.hidden_size)
    return tower.forward + Spent(memory=max(launched - tower.forward.total, 0.0), tensor=sent)


def _vision(hardware: Hardware, workload: Workload) -> Passes:
    """The tower, unless it is spread, and a Q-Former by its FLOPs. Context-parallel ranks deal out whole images."""
    vision = workload.model.vision
    num_images = -(-workload.micro_batch_size * workload.num_images // workload.context_parallel_size)
    if vision is None or not num_images:
        return Passes()
    pieces = forward_flops(workload.model, TokenLoad(num_images=num_images), num_vision_layers=0)
    rate = hardware.device.sustained_tflops.bf16 * 1e12 * QFORMER_SHARE
    qformer = (pieces.qformer_in.forward + pieces.qformer.forward) / rate
    passes = 2 if workload.trains("qformer") else float(workload.trains("vision"))
    found = Passes(Spent(gemm=qformer), Spent(gemm=qformer * passes))
    return found if workload.spreads_vision else _tower(hardware, workload, vision, num_images) + found


def _tower(hardware: Hardware, workload: Workload, vision: VisionConfig, num_images: int) -> Passes:
    """All its layers, and patches."""
    pieces = forward_flops(workload.model, TokenLoad(num_images=num_images), num_vision_layers=0)
    rate = hardware.device.sustained_tflops.bf16 * 1e12 * QFORMER_SHARE
    patches = Spent(gemm=pieces.patch_embedding.forward / rate)
    layers = _vision_layer(hardware, workload, vision, num_images) * workload.num_vision_layers
    return layers + Passes(patches, patches * float(workload.trains("vision")))


def _vision_layer(hardware: Hardware, workload: Workload, vision: VisionConfig, num_images: int) -> Passes:
    """Full attention within an image, two matrices in the MLP, biases. Backward only where the tower learns."""
    device, whole = hardware.device, vision.tower == "hf" or workload.spreads_vision
    tp = 1 if whole else workload.tensor_parallel_size
    features = (vision.image_size // vision.patch_size) ** 2 + (vision.tower != "siglip")
    tokens, hidden, ffn = num_images * features, vision.hidden_size, vision.ffn_hidden_size or 4 * vision.hidden_size
    heads, channels = vision.num_attention_heads / tp, hidden // vision.num_attention_heads
    matrices = ((hidden, 3 * hidden / tp), (hidden / tp, hidden), (hidden, ffn / tp), (ffn / tp, hidden))
    pairs = num_images * features**2
    summed = 0.0 if whole else 2 * all_reduce_s(hardware, workload.groups.tensor, 2 * tokens * hidden)
    forward = Spent(
        gemm=sum(gemm_s(device, tokens, inner, columns, "bf16") for inner, columns in matrices),
        attention=attention_s(device, pairs, heads, channels, features),
        memory=memory_s(device, [tokens * hidden * each for each in (4, 6, 4, 6)] + [tokens * ffn / tp * 4]),
        tensor=summed,
    )
    launch = hardware.host.tower_layer_forward_ms * 1e-3
    if not workload.trains("vision"):
        return Passes(forward, forward_launch_s=launch)
    backward = Spent(
        gemm=2 * forward.gemm,
        attention=attention_s(device, pairs, heads, channels, features, backward=True),
        memory=1.5 * forward.memory,
        tensor=summed,
    )
    return Passes(forward, backward, launch, launch)


def _projector(hardware: Hardware, workload: Workload) -> Passes:
    """One matrix or two; its own input needs a gradient only if something before it learns."""
    model, device = workload.model, hardware.device
    features = model.qformer or model.vision
    tokens = workload.micro_batch_size * workload.num_projected_tokens
    if features is None or not tokens:
        return Passes()
    tp, hidden = workload.tensor_parallel_size, widths(workload).hidden
    matrices: tuple[tuple[float, float], ...] = ((features.hidden_size, hidden / tp), (hidden / tp, hidden))
    matrices = matrices if model.projector.type == "mlp2x_gelu" else matrices[:1]
    gemm = sum(gemm_s(device, tokens, inner, columns, "bf16") for inner, columns in matrices)
    forward = Spent(gemm=gemm, memory=memory_s(device, [6 * tokens * hidden / tp, 4 * tokens * hidden]))
    gradients = float(workload.trains("projector")) + float(workload.trains("vision") or workload.trains("qformer"))
    return Passes(forward, forward * gradients)
