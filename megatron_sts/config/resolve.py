"""The one place where values that follow from a config are computed. Torch-free; knows nothing of how they are used.

Runs after all overrides. Nobody else derives a token count, a layer layout or a batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sts.config.alignment import check_padding, sample_multiple, sequence_multiple, visual_multiple
from megatron_sts.config.architecture import ModelConfig
from megatron_sts.config.checks import check_leaps, check_run
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.held_out import HeldOut, check_validation, held_out
from megatron_sts.config.precision import Product
from megatron_sts.config.prepared import check_prepared, count_prepared
from megatron_sts.config.samples_file import read_entries
from megatron_sts.config.schema import (
    DataConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from megatron_sts.config.section import Section
from megatron_sts.config.sparsity_checks import check_kept, check_rounds
from megatron_sts.config.step_counts import DatasetSize, num_microbatches, num_steps
from megatron_sts.config.tiles import Picture, kept_counts, largest
from megatron_sts.config.tokens import (
    LOOKING,
    TokenCounts,
    is_full_step,
    keep_ratios,
    kept_tokens,
    round_up,
)
from megatron_sts.config.tower import place_of_tower

Layout = tuple[tuple[int, ...], ...]
"""Decoder layers in chunk v of pipeline rank p, as [v][p]. Chunk (v, p) is number v*pp + p from the input."""


class ResolvedStage(Section):
    """One stage with every number that follows from the config."""

    index: int
    """0-based position in the run."""
    name: str
    config: StageConfig
    data: DataConfig
    """The stage's own data, or the run's."""
    num_steps: int
    num_microbatches: int
    """Per data-parallel rank and step."""
    visual_tokens_in: int
    """Tokens an image before VTC, with tiles of the first of ``pictures``; 0 without vision."""
    view_tokens: int
    """Features of one square that the tower sees; as many as ``visual_tokens_in`` without tiles."""
    pictures: tuple[Picture, ...] = ()
    """Tiles: the images of a sample for which plans are made, those with most tokens. Of others follows how many they have from
    their size."""
    uncompressed: TokenCounts
    """The shape of a step without VTC."""
    token_multiple: int
    """Rows are a multiple of this long: what FP8, sequence and context parallelism need."""
    sample_multiple: int
    """A sample takes a multiple of so many tokens in a packed row: what context parallelism needs."""
    visual_multiple: int
    """Kept tokens of an image are a multiple of this, or all: what FP8 needs of the projector's rows."""
    held_out: HeldOut | None
    """What it is validated on."""
    bf16_products: tuple[Product, ...] = ()
    """Of each decoder layer, those that multiply in ``precision.params`` instead of FP8 (``precision.fp8_where: auto``)."""

    def tokens(self, step: int) -> TokenCounts:
        """The shape of a step. Only padded rows get shorter by VTC: packed ones hold more samples, and those that are as
        long as the step's longest may hold as many words as without VTC."""
        vtc, batch = self.config.vtc, self.config.batch
        if vtc is None:
            return self.uncompressed
        if self.pictures:
            return self._tokens_in_tiles(keep_ratios(vtc, step, self.num_steps))
        kept = tuple(
            kept_tokens(vtc, ratio, self.visual_tokens_in, self.visual_multiple)
            for ratio in keep_ratios(vtc, step, self.num_steps)
        )
        if batch.packing != "pad":
            return TokenCounts(visual_tokens_out=kept, sequence_length=self.uncompressed.sequence_length)
        of_images = [kept[min(number, len(kept) - 1)] for number in range(batch.max_images)]
        length = batch.sequence_length - sum(self.visual_tokens_in - count for count in of_images)
        return TokenCounts(visual_tokens_out=kept, sequence_length=round_up(length, self.token_multiple))

    def _tokens_in_tiles(self, ratios: tuple[float, ...]) -> TokenCounts:
        """Rows are shorter by what VTC leaves out of ``pictures``."""
        batch, length = self.config.batch, self.uncompressed.sequence_length
        kept, projected = zip(*(kept_counts(one, self.config.vtc, ratios) for one in self.pictures), strict=True)
        if batch.packing == "pad":
            num_left_out = sum(one.num_tokens for one in self.pictures) - sum(kept)
            length = round_up(batch.sequence_length - num_left_out, self.token_multiple)
        return TokenCounts(
            visual_tokens_out=kept, sequence_length=length, projected_tokens=sum(projected, ()), keep_ratios=ratios
        )

    @property
    def num_images(self) -> int:
        """Of a sample for which plans are made."""
        return len(self.pictures) or self.config.batch.max_images

    @property
    def num_views(self) -> int:
        """Squares of its images that the tower sees."""
        return sum(picture.num_views for picture in self.pictures) or self.config.batch.max_images

    @property
    def is_seekable(self) -> bool:
        """Whether a step's samples follow from its number alone; else they depend on all that its rank read before."""
        return self.data.source != "energon" and self.config.batch.packing != "pack"

    @property
    def typical(self) -> TokenCounts:
        """The shape in the middle of the schedule, for plans; steps that see all tokens are left out."""
        middle = range(self.num_steps // 2, self.num_steps)
        return self.tokens(next((step for step in middle if not self._is_full(step)), self.num_steps - 1))

    def _is_full(self, step: int) -> bool:
        return self.config.vtc is not None and is_full_step(self.config.vtc, step)


class Resolved(Section):
    """A run with every number that follows from its config."""

    config: RunConfig
    """As written, with parallel.data_parallel_size, parallel.vision and a planned number of chunks filled in."""
    is_vision_written: bool
    """Whether parallel.vision was, and would be the same on other ranks."""
    world_size: int
    data_parallel_size: int
    num_vision_layers: int
    """Layers of the tower that are built: none after the projected one."""
    layers_per_chunk: Layout
    layer_owner: tuple[int, ...]
    """Pipeline rank of each 0-based decoder layer."""
    stages: tuple[ResolvedStage, ...]

    @property
    def spreads_vision(self) -> bool:
        """Whether all ranks of a model copy encode a share of each step's images."""
        return self.config.parallel.vision == "spread"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that share one copy of the model."""
        return _model_parallel_size(self.config.parallel)

    def first_stage_sees_pixels(self, stage: ResolvedStage) -> bool:
        """Whether all ranks of the first pipeline stage have a step's pixels: the tower runs there, or a sampler looks at them."""
        vtc = stage.config.vtc
        return not self.spreads_vision or (vtc is not None and vtc.sampler in LOOKING)

    def stage(self, name_or_index: str | int) -> ResolvedStage:
        """The stage with this name or 0-based index."""
        for stage in self.stages:
            if name_or_index in (stage.name, stage.index):
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ConfigError(f"stages.{name_or_index}: no such stage; choose from {names}")


ChooseLayout = Callable[[Resolved], Layout]
"""Plans ``parallel.layout: auto`` for a run that is resolved but for that: it stands there with one chunk a rank.

A pure function of the run, so that every rank and every later start comes to the same layout.
"""
ChooseBf16Products = Callable[[Resolved], Sequence[tuple[Product, ...]]]
"""For ``precision.fp8_where: auto`` each stage's ``bf16_products``, of a run that is resolved but for them. A pure function, too."""


def resolve(
    config: RunConfig,
    *,
    world_size: int | None = None,
    dataset_size: DatasetSize | None = None,
    choose_layout: ChooseLayout | None = None,
    choose_bf16_products: ChooseBf16Products | None = None,
) -> Resolved:
    """Check a config and derive everything that follows from it.

    Args:
        config: what the user wrote, overrides applied.
        world_size: number of ranks that will run; None: as many as the parallel sizes ask for.
        dataset_size: samples of one epoch; None: ``count_samples``. Asked only for stages given in epochs.
        choose_layout: asked for ``parallel.layout: auto``, which is refused without it.
        choose_bf16_products: the same for ``precision.fp8_where: auto``.
    """
    check_run(config)
    check_validation(config)
    data_parallel_size = _data_parallel_size(config.parallel, world_size)
    is_vision_written = config.parallel.vision is not None
    derived = {
        "data_parallel_size": data_parallel_size,
        "vision": place_of_tower(config, _model_parallel_size(config.parallel)),
    }
    parallel = config.parallel.model_copy(update=derived)
    config = config.model_copy(update={"parallel": parallel})
    vision = config.model.vision
    layout = _written_layout(config)
    resolved = Resolved(
        config=config,
        world_size=_model_parallel_size(parallel) * data_parallel_size,
        data_parallel_size=data_parallel_size,
        is_vision_written=is_vision_written,
        num_vision_layers=0 if vision is None else vision.num_layers + 1 + vision.feature_layer,
        layers_per_chunk=layout,
        layer_owner=_layer_owner(layout),
        stages=tuple(_resolve_stage(i, config, dataset_size or count_samples) for i in range(len(config.stages))),
    )
    check_leaps(config, max(stage.num_steps for stage in resolved.stages))
    if parallel.layout == "auto":
        if choose_layout is None:
            refuse("parallel.layout", "auto", "nothing here plans layouts", "write even or the layers of each chunk")
        resolved = with_layout(resolved, choose_layout(resolved))
    for stage in config.stages:
        check_rounds(stage, resolved.layers_per_chunk)
    if config.precision.fp8_where == "auto":
        if choose_bf16_products is None:
            refuse("precision.fp8_where", "auto", "nothing here times products", "set it to all")
        resolved = with_bf16_products(resolved, choose_bf16_products(resolved))
    return resolved


def with_bf16_products(resolved: Resolved, of_stages: Sequence[tuple[Product, ...]]) -> Resolved:
    """The same run with other products outside FP8."""
    pairs = zip(resolved.stages, of_stages, strict=True)
    stages = tuple(stage.model_copy(update={"bf16_products": products}) for stage, products in pairs)
    return resolved.model_copy(update={"stages": stages})


def with_layout(resolved: Resolved, layout: Layout) -> Resolved:
    """The same run with other chunks."""
    vpp = len(layout) if len(layout) > 1 else None
    parallel = resolved.config.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": vpp})
    config = resolved.config.model_copy(update={"parallel": parallel})
    return resolved.model_copy(
        update={"config": config, "layers_per_chunk": layout, "layer_owner": _layer_owner(layout)}
    )


def can_interleave(resolved: Resolved) -> bool:
    """Whether megatron-core's interleaved schedule can run every stage, with any number of chunks a rank."""
    parallel = resolved.config.parallel
    pp = parallel.pipeline_model_parallel_size
    return (
        pp > 1
        and (pp > 2 or parallel.overlap_p2p_comm)
        and all(stage.num_microbatches % pp == 0 for stage in resolved.stages)
    )


def _fewer_tokens(stage: StageConfig, num_pictures: int) -> str:
    """How else images may fit a row."""
    if stage.batch.max_images > 1:
        return ", or a smaller batch.max_images"
    return ", or smaller model.vision.tiles.resolutions" if num_pictures else ""


def count_samples(data: DataConfig) -> int:
    """Samples of one epoch of ``data``."""
    if data.source == "scenes":
        return data.num_samples
    if data.source == "energon":
        return count_prepared(Path(str(data.path)))
    return len(read_entries(Path(str(data.path)), "data.path"))


def _model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that share one copy of the model."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _data_parallel_size(parallel: ParallelConfig, world_size: int | None) -> int:
    """Copies of the model: as configured, else as many as fit ``world_size``, else one."""
    model_size, configured = _model_parallel_size(parallel), parallel.data_parallel_size
    if world_size is None:
        return configured or 1
    if configured is not None and configured * model_size != world_size:
        refuse(
            "parallel.data_parallel_size",
            configured,
            f"tensor x pipeline x context x data = {configured * model_size} ranks, but {world_size} run",
            f"start {configured * model_size} ranks, or set it to null",
        )
    if world_size % model_size:
        refuse(
            "parallel.data_parallel_size",
            "null",
            f"{world_size} ranks run, not a multiple of tensor x pipeline x context = {model_size}",
            "change the number of ranks or the parallel sizes",
        )
    return world_size // model_size


def _written_layout(config: RunConfig) -> Layout:
    """The chunks as written; for ``auto``, until they are planned, one a rank, as even as may be."""
    pp = config.parallel.pipeline_model_parallel_size
    vpp = config.parallel.virtual_pipeline_model_parallel_size or 1
    num_layers, written = config.model.language.num_layers, config.parallel.layout
    if written == "even":
        return ((num_layers // (pp * vpp),) * pp,) * vpp
    if written == "auto":
        return (tuple(num_layers * (rank + 1) // pp - num_layers * rank // pp for rank in range(pp)),)
    return tuple(written[chunk * pp : (chunk + 1) * pp] for chunk in range(vpp))


def _layer_owner(layout: Layout) -> tuple[int, ...]:
    return tuple(rank for chunks in layout for rank, count in enumerate(chunks) for _ in range(count))


def _resolve_stage(index: int, config: RunConfig, dataset_size: DatasetSize) -> ResolvedStage:
    """Derive one stage of a config whose data_parallel_size is filled in."""
    stage = config.stages[index]
    data = stage.data or config.data
    if data.source == "energon":
        check_prepared(Path(str(data.path)))
    if data.source == "llava_json" and not dataset_size(data):
        refuse("data.path", data.path, "holds no samples", "use a file that does")
    view_tokens, vision = _visual_tokens(config.model), config.model.vision
    pictures = largest(vision, stage.batch.max_images) if vision is not None and vision.tiles is not None else ()
    counts_in = [picture.num_tokens for picture in pictures] or [view_tokens] * stage.batch.max_images
    multiple = sequence_multiple(config.parallel, config.precision)
    of_visual = visual_multiple(config.precision)
    check_kept(stage, view_tokens, of_visual)
    uncompressed = stage.batch.sequence_length
    if vision is not None and uncompressed < (needed := sum(counts_in) + 2):
        refuse(
            f"stages.{stage.name}.batch.sequence_length",
            uncompressed,
            f"{len(counts_in)} x {counts_in[0]} visual tokens{' (the most tiles)' if pictures else ''} and 2 of text do not fit",
            f"use at least {needed}{_fewer_tokens(stage, len(pictures))}",
        )
    check_padding(config.parallel, stage, multiple)
    return ResolvedStage(
        index=index,
        name=stage.name,
        config=stage,
        data=data,
        num_steps=num_steps(stage, data, dataset_size),
        num_microbatches=num_microbatches(stage, config.parallel),
        visual_tokens_in=counts_in[0],
        view_tokens=view_tokens,
        pictures=pictures,
        uncompressed=TokenCounts(
            visual_tokens_out=tuple(counts_in) if pictures else (view_tokens,),
            sequence_length=round_up(uncompressed, multiple),
            projected_tokens=sum((kept_counts(picture, None, (1.0,))[1] for picture in pictures), ()),
            keep_ratios=(1.0,) if pictures else (),
        ),
        token_multiple=multiple,
        sample_multiple=sample_multiple(config.parallel),
        visual_multiple=of_visual,
        held_out=held_out(config, stage),
    )


def _visual_tokens(model: ModelConfig) -> int:
    """Visual tokens of one image: a Q-Former's queries, else the patches (the class token is not projected)."""
    if model.vision is None:
        return 0
    patches = (model.vision.image_size // model.vision.patch_size) ** 2
    return patches if model.qformer is None else model.qformer.num_query_tokens
