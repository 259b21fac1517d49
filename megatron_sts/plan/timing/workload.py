"""What one rank of a stage computes, in numbers that times follow from; from a run, or written by hand. Torch-free."""

from __future__ import annotations

from typing import Literal, Self, cast

from pydantic import model_validator

from megatron_sts.config.architecture import ModelConfig, Part
from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage
from megatron_sts.config.section import NonNegativeInt, PositiveInt, Ratio, Section
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import planned_load
from megatron_sts.plan.timing.collectives import Groups, groups_of

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


class Assumptions(Section):
    """What a config does not say and a time depends on. The defaults are what this package does with Transformer Engine."""

    fused_gradient_accumulation: bool = False
    """Weight gradients are summed up by the matrix products themselves; so it is too if the config asks for it
    (``kernels.gradient_accumulation_fusion: true``)."""
    fused_elementwise: bool = False
    """RoPE and SwiGLU are single kernels (megatron-core's fusions); ours are several each (``mcore/torch_ops.py``)."""
    fused_attention: bool = True
    """A kernel that keeps scores on the chip (cuDNN, FlashAttention); false: products, softmax and dropout of whole score matrices."""
    flash_attention_2: bool = False
    """That kernel is FlashAttention-2 (``NVTE_FUSED_ATTN=0``), where the hardware has a rate of it apart."""
    tp_comm_overlap: bool = False
    """Transformer Engine's user buffers: tensor-parallel collectives run in pieces beside the products that need them."""
    fp8_reduce_scatter: bool = False
    """With user buffers (``tp_comm_overlap``) and FP8: outputs of row-split products travel in FP8 (``fp8_buf`` of ``proj_fprop`` and
    ``fc2_fprop``)."""
    gradient_bytes: Literal[2, 4] = 4
    """Of a gradient that micro-batches add to and data-parallel ranks reduce."""
    deferred_head_gradients: NonNegativeInt = 0
    """Of a step's first so many micro-batches the head's weight gradient is computed at the end, when its rank would wait
    (megatron-core's ``defer_embedding_wgrad_compute`` and ``wgrad_deferral_limit``)."""
    overlap_interference: Ratio = 0.12
    """Of the time of a collective that runs beside products: what these lose to its multiprocessors (16 of 132 on Hopper)."""
    cross_entropy_passes: NonNegativeInt = 8
    """How often the loss moves 4 bytes a logit, forward and backward together."""

    @model_validator(mode="after")
    def _has_buffers(self) -> Self:
        if self.fp8_reduce_scatter and not self.tp_comm_overlap:
            raise ValueError("fp8_reduce_scatter=true: only user buffers send in FP8; set tp_comm_overlap=true too")
        return self


ASSUMED = Assumptions()


class Workload(Section):
    """One stage of a run as one rank sees it. Sizes of a micro-batch are of one data-parallel rank, all its tensor- and
    context-parallel ranks together."""

    model: ModelConfig
    num_vision_layers: NonNegativeInt = 0
    frozen: tuple[Part, ...] = ()
    layout: Layout
    tensor_parallel_size: PositiveInt = 1
    context_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt
    """Rows."""
    num_microbatches: PositiveInt
    sequence_length: PositiveInt
    """Tokens of a row."""
    num_images: NonNegativeInt = 0
    """Of a row."""
    num_projected_tokens: NonNegativeInt = 0
    """Of a row: what the projector computes."""
    spreads_vision: bool = False
    """Whether all ranks of a model copy encode a share of a step's images before its first pass."""
    fp8: Recipe | None = None
    fp8_weights: bool = False
    """Weights are kept and gathered in FP8 (``precision.fp8_params``)."""
    num_bf16_layers: NonNegativeInt = 0
    """Decoder layers that multiply in bf16 where others do in FP8."""
    bf16_products: tuple[Product, ...] = ()
    """Of the layers that multiply in FP8, products that do not."""
    recompute: Literal["none", "selective", "full"] = "none"
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_p2p_comm: bool = True
    assumptions: Assumptions = ASSUMED

    @property
    def pipeline_parallel_size(self) -> int:
        """Ranks that a micro-batch passes."""
        return len(self.layout[0])

    @property
    def num_chunks(self) -> int:
        """Of a pipeline rank."""
        return len(self.layout)

    @property
    def num_ranks(self) -> int:
        """Of the run."""
        return self.model_parallel_size * self.data_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks of a copy of the model."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size

    @property
    def tokens(self) -> float:
        """Of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length / self.context_parallel_size

    @property
    def tokens_outside(self) -> float:
        """Of them, those on one tensor-parallel rank outside attention and MLP: a part under sequence parallelism."""
        return self.tokens / (self.tensor_parallel_size if self.sequence_parallel else 1)

    @property
    def fp8_products(self) -> frozenset[Product]:
        """Of a decoder layer that multiplies in FP8, the products that do."""
        return frozenset() if self.fp8 is None else frozenset(PRODUCTS) - set(self.bf16_products)

    @property
    def groups(self) -> Groups:
        """Of one rank."""
        sizes = (self.tensor_parallel_size, self.context_parallel_size, self.data_parallel_size)
        return groups_of(*sizes, self.pipeline_parallel_size)

    def trains(self, part: Part) -> bool:
        """Whether the model has the part and it learns."""
        return part in self.model.parts and part not in self.frozen

    @property
    def gradient_passes(self) -> bool:
        """Whether a gradient passes the decoder: something before it, or itself, learns."""
        return any(self.trains(part) for part in self.model.parts)


def workload_of(
    resolved: Resolved,
    stage: ResolvedStage,
    counts: TokenCounts | None = None,
    assumptions: Assumptions = ASSUMED,
) -> Workload:
    """A stage of a run, with full rows of the shape ``counts`` (None: its typical one) and as many images as it can hold."""
    parallel, precision, batch = resolved.config.parallel, resolved.config.precision, stage.config.batch
    load = planned_load(resolved, stage, counts or stage.typical)
    rows, recipe = batch.global_batch_size, precision.engine_recipe
    tokens = batch.micro_batch_size * load.num_tokens / rows / parallel.context_parallel_size
    fuses = resolved.config.kernels.gradient_accumulation_fusion is True or assumptions.fused_gradient_accumulation
    is_fp8 = recipe is not None and tokens >= precision.min_tokens_for_fp8
    return Workload(
        model=resolved.config.model,
        num_vision_layers=resolved.num_vision_layers,
        frozen=stage.config.freeze,
        layout=resolved.layers_per_chunk,
        tensor_parallel_size=parallel.tensor_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        data_parallel_size=resolved.data_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=batch.micro_batch_size,
        num_microbatches=stage.num_microbatches,
        sequence_length=load.num_tokens // rows,
        num_images=load.num_images // rows,
        num_projected_tokens=load.num_projected_tokens // rows,
        spreads_vision=resolved.spreads_vision,
        fp8=cast(Recipe, recipe) if is_fp8 else None,
        fp8_weights=is_fp8 and precision.fp8_params,
        bf16_products=stage.bf16_products if is_fp8 else (),
        num_bf16_layers=min(2 * precision.first_last_layers_bf16, resolved.config.model.language.num_layers),
        recompute=parallel.recompute,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        overlap_p2p_comm=parallel.overlap_p2p_comm and len(resolved.layers_per_chunk) > 1,
        assumptions=assumptions.model_copy(update={"fused_gradient_accumulation": fuses}),
    )
