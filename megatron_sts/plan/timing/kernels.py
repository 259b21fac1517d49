"""What single kernels take on a GPU: matrix products, fused attention, and whatever only moves bytes. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megatron_sts.plan.hardware import Attention, Device, Format

TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.93), (64, 128, 0.75))
"""Rows and columns of the output that a multiprocessor computes at a time, and the share of the rate that this leaves: smaller
tiles read each operand more often. Shapes of cuBLAS and CUTLASS kernels on Hopper; the shares are estimates."""
EPILOGUE_SHARES = 3
"""A multiprocessor writes its tile at so many times its share of the memory bandwidth: few write at the same time."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of attention backward over forward: five products for two."""
FILL_S = 1e-6
"""Until a tile's first operands have come from memory: two latencies of it, an estimate."""
NARROW_HEAD = 64


def gemm_s(
    device: Device, rows: float, inner: float, columns: float, fmt: Format, *, output_bytes: float = 2, num: int = 1
) -> float:
    """Seconds of ``num`` products [rows, inner] x [inner, columns], one after the other.

    Tiles go to multiprocessors in waves, the last of which may be nearly empty; each tile takes its FLOPs at the sustained rate
    and then writes its output, during which its multiprocessor multiplies nothing. The best tile shape counts, as cuBLAS's
    heuristics mean to choose it. No product is faster than its operands can be read. Zero-sized products take no time.

    Args:
        device: which GPU.
        rows: of the output.
        inner: the dimension that is summed over.
        columns: of the output.
        fmt: what is multiplied.
        output_bytes: moved for each output element: 2 to write bf16, 8 to read and write fp32 when a gradient is summed up.
        num: how many.
    """
    if min(rows, inner, columns, num) <= 0:
        return 0.0
    rate = (getattr(device.sustained_tflops, fmt) or device.sustained_tflops.bf16) * 1e12
    units, bandwidth = device.num_multiprocessors, device.memory_gbytes_per_s * 1e9
    times = []
    for tile_rows, tile_columns, share in TILES:
        waves = math.ceil(math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns) / units)
        multiplies = 2 * tile_rows * tile_columns * inner / (rate / units * share)
        writes = tile_rows * tile_columns * output_bytes / (EPILOGUE_SHARES * bandwidth / units)
        times.append(waves * (multiplies + writes + FILL_S))
    operand_bytes = 1 if fmt == "fp8" else 2
    moved = (rows + columns) * inner * operand_bytes + rows * columns * output_bytes
    return num * (max(min(times), moved / bandwidth) + device.kernel_gap_us * 1e-6)


def attention_s(
    device: Device, pairs: float, heads: float, channels: int, length: float, *, backward: bool = False,
    kernel: Attention | None = None,
) -> float:  # fmt: skip
    """Seconds of fused attention over ``pairs`` query-key pairs (causal ones counted half), 4 x channels FLOPs a pair and head.

    ``length``: tokens of a row, or of the part that a kernel sees: short rows do not reach the plateau. ``kernel``: other than the
    device's usual one.
    """
    if pairs <= 0:
        return 0.0
    kernel = kernel or device.attention
    plateau = kernel.backward_tflops if backward else kernel.forward_tflops
    rate = (
        plateau
        * 1e12
        * length
        / (length + kernel.half_length)
        * (kernel.narrow_heads if channels <= NARROW_HEAD else 1)
    )
    flops = 4 * pairs * heads * channels * (BACKWARD_ATTENTION if backward else 1)
    return flops / rate + device.kernel_gap_us * 1e-6


def memory_s(device: Device, moved_bytes: Iterable[float]) -> float:
    """Seconds of kernels that do nothing but move so many bytes each."""
    kernels = [each for each in moved_bytes if each > 0]
    rate = device.memory_gbytes_per_s * 1e9 * device.memory_efficiency
    return sum(kernels) / rate + len(kernels) * device.kernel_gap_us * 1e-6
