"""One decoder layer: its kernels and collectives, forward and backward. Torch-free.

The list is of megatron-core's ``TransformerLayer`` on Transformer Engine's modules, in the order in which they run: norm, QKV,
RoPE, attention, output, residual; norm, first MLP matrix, SwiGLU, second matrix, residual. h is the hidden size, a and g are heads
and query groups of d channels, f the MLP's width, t the tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.plan.hardware import Format, Hardware
from megatron_sts.plan.timing.collectives import all_reduce_s, gather_s, latency_s, send_s
from megatron_sts.plan.timing.kernels import attention_s, gemm_s, memory_s
from megatron_sts.plan.timing.passes import Passes, Spent
from megatron_sts.plan.timing.workload import Workload

Formats = tuple[Format, ...]
"""Of a layer's products, in the order of ``PRODUCTS``."""
NUM_PIECES = 4
"""Into which a product beside a reduce-scatter is cut (``num_splits`` of NVIDIA's user-buffer settings), and at most beside a
gather: those of eight ranks join their pieces in pairs (``aggregate``)."""
PIECE_LOSS = 0.5
"""Of what products lose when they are cut up, to fit the pieces of a gather: pieces run in several streams, which fill each
other's last waves in part. An estimate."""


@dataclass(frozen=True)
class Widths:
    """Of one tensor-parallel rank."""

    hidden: int
    heads: float
    groups: float
    channels: int
    ffn: float

    @property
    def matrices(self) -> tuple[tuple[float, float], ...]:
        """(in, out) of QKV, output, both MLP matrices."""
        qkv = (self.heads + 2 * self.groups) * self.channels
        output = self.heads * self.channels
        return (self.hidden, qkv), (output, self.hidden), (self.hidden, 2 * self.ffn), (self.ffn, self.hidden)


def summed_bytes(workload: Workload) -> int:
    """A weight gradient that a product adds to the sum of micro-batches: read and written."""
    return 2 * workload.assumptions.gradient_bytes


def added_bytes(workload: Workload) -> int:
    """A weight gradient that is added by a kernel of its own: bf16 read, the sum read and written."""
    return 2 + summed_bytes(workload)


def widths(workload: Workload) -> Widths:
    """Those of the language model."""
    language, tp = workload.model.language, workload.tensor_parallel_size
    heads = language.num_attention_heads
    groups = language.num_query_groups or heads
    channels = language.kv_channels or language.hidden_size // heads
    return Widths(language.hidden_size, heads / tp, max(groups / tp, 1), channels, language.ffn_hidden_size / tp)


def decoder_layer(hardware: Hardware, workload: Workload, in_fp8: Set[Product]) -> Passes:
    """One layer for one micro-batch, of which these products multiply in FP8."""
    formats: Formats = tuple("fp8" if product in in_fp8 else "bf16" for product in PRODUCTS)
    launch, scales_s = _launch_s(hardware, workload, formats), _scales_s(hardware, workload, formats)
    products = _products(hardware, workload, formats)
    forward = Spent(
        gemm=sum(products),
        attention=_attention(hardware, workload),
        memory=_moves(hardware, workload, formats),
        tensor=_collectives(hardware, workload, formats, products) + scales_s,
        context=_context_exchange(hardware, workload),
    )
    if not workload.gradient_passes:
        return Passes(forward, forward_launch_s=launch)
    products = _products(hardware, workload, formats, backward=True)
    backward = Spent(
        gemm=sum(products) + _weight_gradients(hardware, workload, formats),
        attention=_attention(hardware, workload, backward=True),
        memory=_moves_backward(hardware, workload, formats),
        tensor=_collectives_backward(hardware, workload, formats, products) + scales_s,
        context=_context_exchange(hardware, workload, backward=True),
    )
    again = workload.recompute == "full"
    if again:
        backward += forward
    elif workload.recompute == "selective":
        backward += Spent(attention=forward.attention)
    return Passes(forward, backward, launch, launch * (1 + again))


def _launch_s(hardware: Hardware, workload: Workload, formats: Formats) -> float:
    """A forward pass; a backward one takes as long: of its products two are cut up, and four have a collective beside them. What
    FP8 takes more is shared out evenly: each product casts its input and its weight's gradient's."""
    host = hardware.host
    cut = 4 * (_num_pieces(workload, is_gather=True) > 1)
    num, num_fp8 = len(formats), formats.count("fp8")
    layer = (host.fp8_layer_forward_ms * num_fp8 + host.layer_forward_ms * (num - num_fp8)) / num
    return 1e-3 * (layer + host.ring_step_ms * (workload.context_parallel_size - 1) + host.cut_product_ms * cut)


def _scales_s(hardware: Hardware, workload: Workload, formats: Formats) -> float:
    """A layer's share of a chunk's all-reduce of largest values, at the end of each of its passes (``delayed`` with
    ``reduce_amax``; Transformer Engine, ``fp8.py``, ``reduce_and_update_fp8_tensors``)."""
    if "fp8" not in formats or workload.fp8 != "delayed":
        return 0.0
    num_chunks = workload.num_chunks * workload.pipeline_parallel_size
    return latency_s(hardware, workload.groups.scales) * num_chunks / workload.model.language.num_layers


def _products(hardware: Hardware, workload: Workload, formats: Formats, *, backward: bool = False) -> list[float]:
    """Each of the four of a forward pass; backward those for the inputs' gradients. Gathers are beside column-split ones
    forward and row-split ones backward, scatters beside row-split ones forward; those backward have whole products beside them."""
    device, tokens, seconds = hardware.device, workload.tokens, []
    for number, ((inner, columns), fmt) in enumerate(zip(widths(workload).matrices, formats, strict=True)):
        shape = (columns, inner) if backward else (inner, columns)
        whole, num_pieces = gemm_s(device, tokens, *shape, fmt), _num_pieces(workload, is_gather=number % 2 == backward)
        if num_pieces > 1 and (number % 2 == 1 or not backward):
            cut_up = gemm_s(device, tokens / num_pieces, *shape, fmt, num=num_pieces)
            whole = (1 - PIECE_LOSS) * whole + PIECE_LOSS * cut_up
        seconds.append(whole)
    return seconds


def _weight_gradients(hardware: Hardware, workload: Workload, formats: Formats) -> float:
    """Products over all tokens, and adding them to the sum of micro-batches."""
    if not workload.trains("language"):
        return 0.0
    device, fused = hardware.device, workload.assumptions.fused_gradient_accumulation
    seconds = 0.0
    for (inner, columns), fmt in zip(widths(workload).matrices, formats, strict=True):
        seconds += gemm_s(
            device, columns, workload.tokens, inner, fmt, output_bytes=summed_bytes(workload) if fused else 2
        )
        seconds += 0 if fused else memory_s(device, [added_bytes(workload) * inner * columns])
    return seconds


def _attention(hardware: Hardware, workload: Workload, *, backward: bool = False) -> float:
    """Causal. A ring of cp ranks computes blocks of rows of s/cp tokens and corrects the sum after each."""
    if not workload.assumptions.fused_attention:
        return _unfused_attention(hardware, workload, backward=backward)
    at, cp, length = widths(workload), workload.context_parallel_size, workload.sequence_length
    pairs = workload.micro_batch_size * length**2 / 2 / cp
    kernel = hardware.device.flash_attention_2 if workload.assumptions.flash_attention_2 else None
    seconds = attention_s(hardware.device, pairs, at.heads, at.channels, length / cp, backward=backward, kernel=kernel)
    if cp > 1:
        output = workload.tokens * at.heads * at.channels
        seconds += memory_s(hardware.device, [10 * output] * cp)
    return seconds


def _unfused_attention(hardware: Hardware, workload: Workload, *, backward: bool) -> float:
    """Scores, softmax (read, write), dropout (read, write, a byte of mask), values; all of the square, causal or not."""
    at, length = widths(workload), workload.sequence_length
    rows = workload.tokens * at.heads
    scores = gemm_s(hardware.device, rows, at.channels, length, "bf16")
    values = gemm_s(hardware.device, rows, length, at.channels, "bf16")
    moved = [6, 5] if backward else [4, 5]  # softmax backward reads its output too
    passes = 2 if backward else 1
    return passes * (scores + values) + memory_s(hardware.device, [each * rows * length for each in moved])


def _moves(hardware: Hardware, workload: Workload, formats: Formats) -> float:
    """Norms (read, write), RoPE, SwiGLU, residual sums (read two, write one); inputs of products in FP8 are cast."""
    hidden = widths(workload).hidden * workload.tokens_outside
    kernels = [4 * hidden, 6 * hidden, 4 * hidden, 6 * hidden, *_rope(workload), *_swiglu(workload)]
    return memory_s(hardware.device, [*kernels, *_casts(workload, formats)])


def _moves_backward(hardware: Hardware, workload: Workload, formats: Formats) -> float:
    """The same kernels' backward passes: norms read two and write one, gradients of queries, keys and values are joined, and
    where a branch leaves the residual stream two gradients are summed. FP8 casts the outputs' gradients."""
    at = widths(workload)
    hidden = at.hidden * workload.tokens_outside
    joined = 4 * (at.heads + 2 * at.groups) * at.channels * workload.tokens
    kernels = [*[6 * hidden] * 4, joined, *_rope(workload), *_swiglu(workload, backward=True)]
    return memory_s(hardware.device, [*kernels, *_casts(workload, formats, backward=True)])


def _rope(workload: Workload) -> list[float]:
    """Bytes of each kernel: read, write; or, of queries and of keys, one product and two updates of each half."""
    at = widths(workload)
    rotated = (at.heads + at.groups) * at.channels * workload.tokens
    return (
        [4 * rotated]
        if workload.assumptions.fused_elementwise
        else [each * rotated / 2 for each in (4, 2, 3, 2, 3)] * 2
    )


def _swiglu(workload: Workload, *, backward: bool = False) -> list[float]:
    """Bytes of each kernel. One: two halves are read (backward with a gradient), the result or both gradients written."""
    elements = widths(workload).ffn * workload.tokens
    if workload.assumptions.fused_elementwise:
        return [(10 if backward else 6) * elements]
    return [each * elements for each in ((6, 6, 4, 6) if backward else (4, 6))]


def _casts(workload: Workload, formats: Formats, *, backward: bool = False) -> list[float]:
    """Read bf16, write FP8 and its transpose. What is gathered is cast by each rank for itself, and transposed when it is whole.
    A scale of the tensor itself (all but ``delayed``) takes one more reading of gradients; the kernels before find that of inputs.
    With ``delayed`` norms write FP8 themselves. Source: Transformer Engine, ``module/layernorm_linear.py``, ``module/base.py``."""
    kernels, tokens, delayed = [], workload.tokens, workload.fp8 == "delayed"
    for number, ((inner, columns), fmt) in enumerate(zip(widths(workload).matrices, formats, strict=True)):
        if fmt != "fp8":
            continue
        is_gathered = workload.sequence_parallel and number % 2 == backward
        own = workload.tokens_outside if is_gathered else tokens
        if delayed and not backward and number % 2 == 0:
            moved = 2 * tokens - own  # transposed; the norm wrote a byte for two
        else:
            moved = (3 * own + 2 * tokens if is_gathered else 4 * tokens) + 2 * own * (backward and not delayed)
        kernels.append((columns if backward else inner) * moved)
    return kernels


def _collectives(hardware: Hardware, workload: Workload, formats: Formats, products: list[float]) -> float:
    """Before each column-split matrix a gather, after each row-split one a reduce-scatter; without sequence parallelism an
    all-reduce after the latter alone."""
    whole, group = _activations(workload), workload.groups.tensor
    if not workload.sequence_parallel:
        return 2 * all_reduce_s(hardware, group, whole)
    seconds = 0.0
    for number, (fmt, each) in enumerate(zip(formats, products, strict=True)):
        is_gather = number % 2 == 0
        halves = fmt == "fp8" and (is_gather or workload.assumptions.fp8_reduce_scatter)
        sent = gather_s(hardware, group, whole / 2 if halves else whole)
        seconds += _in_pieces(workload, sent, each, is_gather=is_gather)
    return seconds


def _collectives_backward(hardware: Hardware, workload: Workload, formats: Formats, products: list[float]) -> float:
    """The gradients of the row-split matrices' outputs are gathered first. The column-split ones' inputs are gathered again
    beside one product, and their gradients scattered beside another of about the same time."""
    whole, group = _activations(workload), workload.groups.tensor
    if not workload.sequence_parallel:
        return sum(_beside(workload, all_reduce_s(hardware, group, whole), each) for each in products[::2])
    scatter = gather_s(hardware, group, whole)
    gathers = [gather_s(hardware, group, whole / 2 if fmt == "fp8" else whole) for fmt in formats]
    again = [gather if workload.trains("language") else 0.0 for gather in gathers[::2]]
    column = sum(
        _beside(workload, gather, each) + _beside(workload, scatter, each)
        for gather, each in zip(again, products[::2], strict=True)
    )
    row = zip(gathers[1::2], products[1::2], strict=True)
    return column + sum(_in_pieces(workload, gather, each, is_gather=True) for gather, each in row)


def _num_pieces(workload: Workload, *, is_gather: bool) -> int:
    """Into which a product and the collective before or after it are cut."""
    tp = workload.tensor_parallel_size
    if not workload.assumptions.tp_comm_overlap or not workload.sequence_parallel or tp == 1:
        return 1
    return min(tp, NUM_PIECES) if is_gather else NUM_PIECES


def _in_pieces(workload: Workload, seconds: float, product_s: float, *, is_gather: bool) -> float:
    """What shows of a collective before or after its product: one piece, the others run beside."""
    num = _num_pieces(workload, is_gather=is_gather)
    return seconds / num + _beside(workload, seconds * (num - 1) / num, product_s)


def _beside(workload: Workload, seconds: float, product_s: float) -> float:
    """What shows of communication beside a product: what takes longer than that, and what the product loses by it."""
    hidden = min(seconds, product_s)
    return seconds - hidden + workload.assumptions.overlap_interference * hidden


def _activations(workload: Workload) -> float:
    """Bytes of the residual stream of all tensor-parallel ranks together, bf16."""
    return 2 * workload.tokens * workload.model.language.hidden_size


def _context_exchange(hardware: Hardware, workload: Workload, *, backward: bool = False) -> float:
    """Keys and values (backward: and their gradients) go round the ring while blocks are computed: what takes longer than a
    block shows."""
    cp, at = workload.context_parallel_size, widths(workload)
    if cp == 1:
        return 0.0
    message = 2 * 2 * workload.tokens * at.groups * at.channels * (2 if backward else 1)
    hop = send_s(hardware, workload.groups.context, message)
    block = _attention(hardware, workload, backward=backward) / cp
    return (cp - 1) * _beside(workload, hop, block)
