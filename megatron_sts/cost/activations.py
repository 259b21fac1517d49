"""What autograd keeps of one micro-batch for its backward pass, from shapes alone. Torch-free; knows no schedule.

Counted are storages: a view keeps all of the tensor that it looks at. Parameters, the batch itself and what lives within one
pass only are not in it. b rows of s tokens are t = b s tokens; a heads and g groups of d channels, hidden size h, SwiGLU size f,
e bytes an element; tensor parallelism divides what is split by tp, and with sequence parallelism also t' = t / tp.

One decoder layer (after Korthikanti et al., "Reducing Activation Recomputation", arXiv 2205.05198, for the modules that run here):

=================== ==================================== =============================================================
norms               2 (e t' h + 4 t')                    inputs, and fp32 inverse deviations
linear inputs       2 e t' h + e t f / tp                outputs of the norms and of SwiGLU; none if the weights are frozen
fused QKV           e t (a + 2 g) d / tp                 values are a view of it
rotated Q and K     e t (a + g) d / tp, 4 e t d          and the angles' cosines and sines, for either
attention           e t a d / tp + 4 t a / tp            output (also the next matrix's input) and fp32 log-sum-exp; see ``_attention``
SwiGLU              2 e t f / tp                         its input
=================== ==================================== =============================================================

Transformer Engine's modules keep the same tensors, but one byte an element of the inputs of those of QKV, fc1 and fc2 that multiply
in FP8 (the attention's output is kept in 16 bits for the next matrix, ``save_original_input``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.cost.memory import learning_parts
from megatron_sts.cost.step import microbatch_load
from megatron_sts.cost.vision import qformer_bytes, tower_bytes
from megatron_sts.cost.weights import head_width, num_groups

Kernels = Literal["torch", "engine"]
"""Whose layers the decoder has: torch's or Transformer Engine's."""
FP32_BYTES, INDEX_BYTES, MASK_BYTES = 4, 8, 1


@dataclass(frozen=True)
class Saved:
    """Bytes on one tensor-parallel rank for one micro-batch."""

    before: int
    """Embedding, merge, and of tower, Q-Former and projector what learns or passes gradients on; on the first rank."""
    whole_input: int
    """With sequence parallelism, more of the first layer's input on the first rank: a view of the whole sequence."""
    layers: tuple[int, ...]
    """Of each decoder layer, if it runs."""
    recomputed: int
    """More while a layer's backward pass runs: with full recomputation all that it would have kept."""
    after: int
    """Final norm, head and loss; on the last rank."""
    logits: int
    """Not kept, but there while head and loss run: logits of 16 bits and, in megatron-core's fused cross entropy, a second copy
    in fp32."""
    arguments: int
    """Not autograd's, but there as long as a chunk's: what recomputation is called with besides its input."""


def saved(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts, kernels: Kernels) -> Saved:
    """Bytes that a micro-batch of the stage leaves for its backward pass when rows have these ``counts``."""
    load, learning = microbatch_load(resolved, stage, counts), learning_parts(resolved, stage)
    share, language = _share(resolved, stage, load), resolved.config.model.language
    learns, is_full = "language" in learning, resolved.config.parallel.recompute == "full"
    layers = [
        _layer(resolved, stage, share, kernels, learns=learns, number=number) for number in range(language.num_layers)
    ]
    residual = share.element_bytes * share.own_tokens * language.hidden_size
    logits = share.tokens * language.vocab_size // share.tp
    return Saved(
        before=_token_ids(share, learns=learns) + _before_merge(resolved, stage, share, load),
        whole_input=share.element_bytes * (share.tokens - share.own_tokens) * language.hidden_size,
        layers=(residual,) * len(layers) if is_full else tuple(layers),
        recomputed=max(layers) - residual if is_full else 0,
        after=_after(resolved, share, learns=learns),
        logits=(share.element_bytes + FP32_BYTES) * logits if share.element_bytes < FP32_BYTES else 0,
        arguments=_arguments(resolved, share, kernels),
    )


@dataclass(frozen=True)
class _Share:
    """What one rank has of a micro-batch."""

    element_bytes: int
    tp: int
    whole_tokens: int
    """Of whole rows, which embedding and merge see."""
    tokens: int
    """Where context parallelism has cut them."""
    own_tokens: int
    """Where sequence parallelism has, too."""
    pairs: int
    """Query-key pairs that a mask tells apart: with packing those of all rows' keys and the rank's queries, else 0."""
    cp: int
    row_length: int
    """Of a whole row."""


def _share(resolved: Resolved, stage: ResolvedStage, load: TokenLoad) -> _Share:
    parallel = resolved.config.parallel
    tp, tokens = parallel.tensor_model_parallel_size, load.num_tokens // parallel.context_parallel_size
    return _Share(
        whole_tokens=load.num_tokens,
        cp=parallel.context_parallel_size,
        row_length=load.num_tokens // stage.config.batch.micro_batch_size,
        element_bytes=4 if resolved.config.precision.params == "fp32" else 2,
        tp=tp,
        tokens=tokens,
        own_tokens=tokens // tp if parallel.sequence_parallel else tokens,
        pairs=load.num_pairs // parallel.context_parallel_size if stage.config.batch.packing == "pack" else 0,
    )


def _layer(
    resolved: Resolved, stage: ResolvedStage, share: _Share, kernels: Kernels, *, learns: bool, number: int
) -> int:
    """A decoder layer without full recomputation: the table above."""
    language, size, tokens, tp = resolved.config.model.language, share.element_bytes, share.tokens, share.tp
    own_hidden = share.own_tokens * language.hidden_size
    norms = 2 * (size * own_hidden + FP32_BYTES * share.own_tokens)
    hidden, ffn = tokens * language.hidden_size, tokens * language.ffn_hidden_size // tp
    of_products: dict[Product, tuple[int, int]] = {
        "qkv": (own_hidden, hidden),
        "fc1": (own_hidden, hidden),
        "fc2": (ffn, ffn),
    }
    inputs = 0
    for product, (own, gathered) in of_products.items():
        # torchao's product keeps its operands in any case, and of a gathered sequence all.
        if is_emulated(resolved, stage, number, product):
            inputs += size * gathered
        elif learns:
            in_fp8 = kernels == "engine" and multiplies_in_fp8(resolved, stage, tokens, number, product)
            inputs += (1 if in_fp8 else size) * own
    swiglu = 2 * size * ffn
    keeps_output = learns or is_emulated(resolved, stage, number, "proj")
    return norms + inputs + _attention(resolved, share, kernels, keeps_output=keeps_output) + swiglu


def _attention(resolved: Resolved, share: _Share, kernels: Kernels, *, keeps_output: bool) -> int:
    """QKV, rotated queries and keys, and what the kernel keeps.

    Recomputed, the kernel's output stays only as the next matrix's input. torch's kernel for packed rows adds a mask to the scores, and
    with grouped queries takes copies of keys and values for every head, which it keeps instead of the groups'.
    """
    language, size, tokens, tp = resolved.config.model.language, share.element_bytes, share.tokens, share.tp
    heads, groups = language.num_attention_heads // tp, num_groups(language) // tp
    per_head = size * tokens * head_width(language)
    qkv, rotated, angles = per_head * (heads + 2 * groups), per_head * (heads + groups), 4 * per_head
    output, log_sums = per_head * heads, FP32_BYTES * tokens * heads
    if resolved.config.parallel.recompute == "selective":
        return qkv + rotated + angles + (output if keeps_output else 0)
    if kernels == "torch" and share.cp > 1:
        joined = output if keeps_output and not share.pairs else 0  # the output of both pieces
        return per_head * heads + angles + _gathered_keys(share, per_head, heads, groups) + output + log_sums + joined
    if kernels == "engine" or not share.pairs:
        return qkv + rotated + angles + output + log_sums
    if groups < heads:
        qkv, rotated = 0, 3 * per_head * heads
    return qkv + rotated + angles + output + log_sums + size * share.pairs


def _gathered_keys(share: _Share, per_head: int, heads: int, groups: int) -> int:
    """Keys and values of whole rows, as torch's attention over context-parallel ranks keeps them, and its masks.

    A rank's two pieces of s / (2 cp) queries see (2 cp + 1) s / (2 cp) keys together, those of packed rows all s; with grouped queries
    these are copied for each head.
    """
    piece = share.row_length // (2 * share.cp)
    whole = 2 * groups * per_head * share.cp
    copies = 2 * heads * per_head * (2 * share.cp if share.pairs else 2 * share.cp + 1) // 2
    mask = share.pairs or piece**2 * (2 * share.cp + 1)
    return (copies if groups < heads else whole) + share.element_bytes * mask


def multiplies_in_fp8(resolved: Resolved, stage: ResolvedStage, num_tokens: int, layer: int, product: Product) -> bool:
    """Whether Transformer Engine computes this product of a decoder layer (0-based) in FP8 when a rank's micro-batch has so many
    tokens."""
    precision = resolved.config.precision
    is_few = num_tokens < precision.min_tokens_for_fp8
    return precision.engine_recipe is not None and not is_few and not _is_left(resolved, stage, layer, product)


def has_fp8(resolved: Resolved, stage: ResolvedStage, num_tokens: int) -> bool:
    """Whether Transformer Engine computes any product in FP8 when a rank's micro-batch has so many tokens."""
    layers = range(resolved.config.model.language.num_layers)
    places = itertools.product(layers, PRODUCTS)
    return any(multiplies_in_fp8(resolved, stage, num_tokens, layer, product) for layer, product in places)


def is_emulated(resolved: Resolved, stage: ResolvedStage, layer: int, product: Product) -> bool:
    """Whether this product of a decoder layer (0-based) is one of emulated FP8."""
    return resolved.config.precision.fp8 == "emulate" and not _is_left(resolved, stage, layer, product)


def _is_left(resolved: Resolved, stage: ResolvedStage, layer: int, product: Product) -> bool:
    """Whether a product is not in FP8 for its place."""
    num_layers, num_outer = resolved.config.model.language.num_layers, resolved.config.precision.first_last_layers_bf16
    return min(layer, num_layers - 1 - layer) < num_outer or product in stage.bf16_products


def _arguments(resolved: Resolved, share: _Share, kernels: Kernels) -> int:
    """fp32 angles of positions, and for packed rows the mask."""
    recompute = resolved.config.parallel.recompute
    angles = FP32_BYTES * share.tokens * head_width(resolved.config.model.language) if recompute == "full" else 0
    return angles + (MASK_BYTES * share.pairs if recompute != "none" and kernels == "torch" else 0)


def _after(resolved: Resolved, share: _Share, *, learns: bool) -> int:
    """Final norm e t' h + 4 t', its output e t' h for the head's weights, fp32 probabilities 4 t v / tp, and the targets."""
    language, own_hidden = resolved.config.model.language, share.own_tokens * resolved.config.model.language.hidden_size
    norm = (2 if learns else 1) * share.element_bytes * own_hidden + FP32_BYTES * share.own_tokens
    return (
        norm + FP32_BYTES * share.tokens * language.vocab_size // share.tp + (INDEX_BYTES + MASK_BYTES) * share.tokens
    )


def _token_ids(share: _Share, *, learns: bool) -> int:
    """Of the word embedding: this rank's ids, where the vocabulary is split, and which are others'."""
    return (INDEX_BYTES + MASK_BYTES) * share.whole_tokens if learns and share.tp > 1 else 0


def _before_merge(resolved: Resolved, stage: ResolvedStage, share: _Share, load: TokenLoad) -> int:
    """Projector: its input for the first matrix, the GELU's input, and its output for the second; tower and Q-Former."""
    model, learning = resolved.config.model, learning_parts(resolved, stage)
    if model.vision is None:
        return 0
    size, projected, hidden = share.element_bytes, load.num_projected_tokens, model.language.hidden_size
    before = 0
    if "vision" in learning:
        before += tower_bytes(model.vision, resolved.num_vision_layers, size, share.tp, -(-load.num_images // share.cp))
    if model.qformer is not None and ("qformer" in learning or "vision" in learning):
        before += qformer_bytes(model.qformer, model.vision, size, -(-load.num_images // share.cp))
    passes = bool({"vision", "qformer", "projector"} & set(learning))
    learns = "projector" in learning
    is_held = resolved.spreads_vision and model.qformer is None  # through the step: ``vision.features_bytes``
    inputs = size * projected * (model.qformer or model.vision).hidden_size if learns and not is_held else 0
    if model.projector.type == "linear":
        return before + inputs
    return before + inputs + size * projected * hidden // share.tp * (passes + learns)
