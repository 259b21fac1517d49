"""What a user may write in a config file. Torch-free; knows nothing of how a value is used.

Every model is frozen and refuses unknown keys. Values that follow from others are not here: see
``resolve.py``. Sections of whole topics (``model``, ``precision``, ``checkpoint``, ...) are in files of their own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_sts.config.architecture import ModelConfig, Part
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.logs import LoggingConfig
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.saving import CheckpointConfig, GuardConfig
from megatron_sts.config.section import Epsilon, Fraction, NonNegativeInt, PositiveInt, Ratio, Section
from megatron_sts.config.validation import ValidationConfig

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Share of a moving average that a step keeps."""
TemplateName = Literal["chat", "plain", "vicuna_v1", "llama3", "chatml"]


class ParallelConfig(Section):
    """How the model is spread over devices. Sizes are numbers of ranks."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks that share the layers, one after the other."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each row, for rows too long for one: of 2 x this many equal pieces each has one from either
    end. They hold the same weights, as data-parallel ranks do."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the tokens of norms and residuals; less activation memory."""
    data_parallel_size: PositiveInt | None = None
    """None: the world size divided by tensor x pipeline x context sizes (1 for a local launch)."""
    layout: Literal["even", "auto"] | tuple[NonNegativeInt, ...] = "even"
    """Decoder layers of each pipeline chunk, in the order in which data pass (chunk v x pp + p is pipeline rank p's).

    even: as many in each; auto: planned for the run's LDS schedule, in as many chunks a rank as are written or, with
    ``virtual_pipeline_model_parallel_size: null``, as many as are best (``megatron-sts plan`` shows these). Planned in FLOPs of
    matrix products, so that it is the same layout on any hardware; ``plan --search`` plans in seconds of one.
    """
    use_distributed_optimizer: bool = False
    """Data-parallel ranks share the optimizer's state (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce a layer's gradients while earlier layers still run backward."""
    overlap_param_gather: bool = False
    """Gather a layer's updated parameters while the layers before it run forward; needs the distributed optimizer."""
    overlap_p2p_comm: bool = True
    """Individual, overlapped stage-to-stage transfers; interleaving with two pipeline ranks is wrong without it."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the decoder."""
    vision: Literal["first", "spread"] | None = None
    """Where the vision tower runs. first: on the first pipeline stage, within the passes, its layers split over tensor-parallel
    ranks. spread: all ranks of a model copy hold the whole tower, and before a step's first pass each encodes an equal share of
    its images; for towers that never learn. None: spread for these where a copy of the model has several ranks, else first.
    """
    timeout_s: Annotated[float, Field(gt=0, le=604_800)] = 600.0
    """A collective that waits longer than this fails on every rank instead of hanging. At most a week."""


class DataConfig(Section):
    """Where samples come from."""

    source: Literal["scenes", "llava_json", "energon"] = "scenes"
    """scenes: drawn on the fly; llava_json: a small JSON file with pictures, read as it is; energon: shards that
    ``megatron-sts data prepare`` wrote, for everything larger."""
    mode: Literal["caption", "questions", "words", "map", "words_and_map", "induction"] = "questions"
    """scenes: what a sample asks for. The last four are text-only."""
    families: tuple[str, ...] = (
        "existence", "relation", "category", "counting", "ocr", "choice", "paired", "locate", "name",
    )  # fmt: skip
    """scenes: question families drawn from."""
    num_turns: PositiveInt = 4
    """scenes: questions a sample."""
    num_samples: PositiveInt = 10_000
    """scenes: size of one epoch (the stream itself is endless)."""
    induction_fraction: Fraction = 0.0
    """scenes: share of samples that are induction warm-up lists."""
    text_only_fraction: Fraction = 0.0
    """scenes: share of samples without an image."""
    path: str | None = None
    """llava_json: the file: a JSON list, {"data": [...]}, or an entry a line. energon: the prepared folder (or one of others,
    of samples KEY.json with KEY.jpg or KEY.0.jpg, KEY.1.jpg, ...), or an Energon Metadataset YAML that blends some.

    A run that goes on may find them elsewhere, and refuses other ones. It compares the JSON and the sizes of 16 of its pictures;
    of shards their sizes and numbers of samples and what was prepared from: not what is in pictures and shards of the same size.
    """
    image_dir: str | None = None
    """llava_json: folder that image names are relative to. Defaults to the JSON's folder."""
    num_workers: NonNegativeInt = 2
    """energon: processes of each data-parallel rank that read and decode; 0: the training process does. A stage that goes on
    from its middle keeps the number with which it was saved."""
    shuffle_buffer_size: PositiveInt = 1000
    """energon: samples, pictures still encoded, from which each worker draws the next."""
    tokenizer: str = "scenes"
    """``scenes`` (embedded SentencePiece), a SentencePiece ``.model`` file, or a Hugging Face tokenizer folder."""
    template: TemplateName = "chat"
    """How turns become tokens: ``chat``, role pieces of our own; ``plain``, the answer right after the image (LLaVA's
    alignment format); ``vicuna_v1`` (LLaVA-1.5), ``llama3`` (Llama-3-Instruct), ``chatml`` (Qwen2)."""
    too_long: Literal["skip", "truncate"] = "skip"
    """What becomes of samples of more tokens than ``batch.sequence_length`` (VTC subtracted). skip: left out as bad ones;
    truncate: cut behind the last answer that fits, counted as ``samples_truncated``, and left out only if that would leave out
    an image or every answer. (LLaVA-1.5 cuts wherever the length ends.)"""
    max_bad_fraction: Fraction = 0.05
    """Skipped samples, as a share of all since the stage began, above which the run stops (judged from the 100th sample
    on, and at the stage's end). A stage that used none always fails."""


class PartOptimizerConfig(Section):
    """What differs for one part of the model. None: as the stage's."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Largest learning rate; it rises and falls as the stage's does, ``min_lr`` in proportion."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's, times the part's learning rate; biases and norms have none."""


class PartsOptimizerConfig(Section):
    """Parts that learn at a rate of their own, as the towers of LLaVA-NeXT and LLaVA-OneVision do. None: as the stage says."""

    vision: PartOptimizerConfig | None = None
    """Of the tower."""
    qformer: PartOptimizerConfig | None = None
    """Of the Q-Former."""
    projector: PartOptimizerConfig | None = None
    """Of the projector, with the newline token of tiles."""
    language: PartOptimizerConfig | None = None
    """Of the decoder."""


class OptimizerConfig(Section):
    """Adam(W) with warm-up and decay."""

    name: Literal["adam"] = "adam"
    """AdamW: decay apart from the gradient."""
    lr: Annotated[float, Field(gt=0)]
    """Largest learning rate, reached after the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where the learning rate ends, unless it is constant; at most ``lr``."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls to ``min_lr``, which it has reached after the stage's last step. wsd: it stays, and falls
    linearly over the last ``decay_fraction`` of the steps (warm-up, stable, decay: MiniCPM, arXiv 2404.06395), the first of
    which has all of it; constant: it does not fall."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """wsd: share of the stage's steps over which the learning rate falls."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, times the learning rate; biases and norms have none."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's averages of gradients and of their squares."""
    eps: Epsilon = 1e-8
    """Added to the root of Adam's second moment."""
    parts: PartsOptimizerConfig = PartsOptimizerConfig()
    """Learning rate and weight decay of single parts."""


class BatchConfig(Section):
    """Shapes of a step."""

    global_batch_size: PositiveInt
    """Samples a step, over all data-parallel ranks."""
    micro_batch_size: PositiveInt
    """Samples a forward pass on one rank."""
    sequence_length: PositiveInt
    """Tokens a sample without compression, visual placeholders included. VTC shortens it."""
    max_images: PositiveInt = 1
    """Images a sample, as planned for: without packing VTC shortens every row by what it drops from so many, and memory, FLOPs and
    seconds are planned with so many. Samples with more are trained all the same, where they fit the row."""
    packing: Literal["none", "pad", "pack"] = "pad"
    """How samples become rows. pad: one a row, padded to the sequence length; none: one a row, padded to the longest of
    the step; pack: as many as fit a row, each attending to itself alone. VTC then leaves rows as long, for more samples."""
    balance: Literal["off", "cost"] = "off"
    """Which data-parallel rank gets which samples of a global batch. off: as they follow each other; cost: so that all have about
    as many FLOPs, counted as they are computed. With ``packing: pad``, where all rows are as long, samples with many images meet
    such with few; with ``packing: none``, rows as long as the longest of their micro-batch, samples of about a length share one.
    The global batch and its loss stay the same; not for packed rows, energon and tiles."""


class VtcConfig(Section):
    """Visual Token Compressor: which of an image's projected tokens the language model sees."""

    sampler: Literal["uniform", "random", "guided", "anchored", "pooled"] = "uniform"
    """Which tokens stay. uniform: evenly spaced; random: a fresh subset for each image; guided: those most like the
    instruction's words; anchored: an even grid, patches with text, and a relevant and diverse rest; pooled: means of areas.
    """
    keep_ratio: Ratio = 0.5
    """Share of an image's tokens that stay, rounded to a number that the layout needs."""
    schedule: Literal["constant", "linear", "cosine", "piecewise"] = "constant"
    """How the keep ratio moves over the stage: from ``keep_ratio`` to ``final_keep_ratio``, or along ``schedule_points``."""
    final_keep_ratio: Ratio | None = None
    """linear, cosine: the keep ratio towards which the stage moves."""
    schedule_points: tuple[tuple[Fraction, Ratio], ...] = ()
    """piecewise: (share of the stage, keep ratio) with rising shares, joined by straight lines."""
    full_every: PositiveInt | None = None
    """Every n-th step sees all tokens."""
    full_fraction: Fraction = 0.0
    """Share of steps, evenly spread, that see all tokens (DualSpeed's slow steps)."""
    keep_ratio_by_image: tuple[Ratio, ...] = ()
    """Keep ratios of a sample's first, second, ... image, the last one for all further. With ``model.vision.tiles``: of an image's
    overview and of its tiles, or of a video's frames. Replaces ``keep_ratio``."""
    positions: Literal["original", "compact"] = "original"
    """original: kept tokens and text keep the RoPE positions of the uncompressed sequence; compact: 0, 1, 2, ..."""
    grid_share: Fraction = 0.3
    """anchored: share of the kept tokens that form an even grid."""
    text_share: Fraction = 0.4
    """anchored: share of the kept tokens that go to the patches with the most thin, strong strokes."""

    @model_validator(mode="after")
    def _shares(self) -> VtcConfig:
        for name in ("grid_share", "text_share"):
            # Not whether it was written: a resolved config writes every default.
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.sampler != "anchored" and value != default:
                raise ValueError(f"{name}={value:g}: sampler={self.sampler} reads no shares; remove it")
        if (total := self.grid_share + self.text_share) > 1:
            raise ValueError(
                f"grid_share + text_share = {total:g} > 1 (grid_share={self.grid_share:g}, "
                f"text_share={self.text_share:g}): they are shares of the kept tokens; lower either"
            )
        return self


class LdsConfig(Section):
    """Layer Dynamic Skipper: p_l(e) = alpha x decay(e) x depth(l), arXiv 2509.18150.

    The paper's: decay(e) = ((E-e)/E)^2 and depth(l) = 1 + epsilon (2l-(L-1))/(L-1).
    """

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Skip probability at the stage's start, mean over the layers."""
    epsilon: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.5
    """How much it rises with depth: from alpha (1 - epsilon) to alpha (1 + epsilon)."""
    schedule: Literal["paper", "linear", "cosine", "constant", "piecewise"] = "paper"
    """decay(e) with x = e/E: paper (1-x)^2, linear 1-x, cosine (1+cos(pi x))/2, constant 1, piecewise ``schedule_points``."""
    schedule_points: tuple[tuple[Fraction, Fraction], ...] = ()
    """piecewise: (x, decay) with rising x, joined by straight lines and held before the first and after the last."""
    depth_profile: Literal["linear", "flat", "protect"] = "linear"
    """depth(l): linear as the paper's, flat 1, protect 0 for the protected layers and linear over the rest."""
    protect_first: NonNegativeInt = 0
    """protect: so many layers next to the input are never skipped."""
    protect_last: NonNegativeInt = 0
    """protect: so many layers next to the output are never skipped."""
    sampler: Literal["bernoulli", "balanced", "quota", "rounds", "fixed"] = "bernoulli"
    """How masks with these probabilities are drawn; balanced and quota even out what pipeline ranks execute, rounds skips
    whole rounds of an interleaved pipeline, which the step's schedule then leaves out."""
    rounds: Literal["layout"] | PositiveInt = "layout"
    """rounds: what is skipped together. layout: chunk v of every pipeline rank; a number: so many equal blocks of layers, the
    same on every layout (only those that are whole rounds of the layout shorten the schedule)."""
    head_yields: Literal["auto", "off"] = "auto"
    """rounds, in a step that skips the last round. auto: the head takes the place of as much of its rank's work in the last
    round that runs, layers of it being skipped too; off: it comes on top."""
    fixed_layers: tuple[int, ...] = ()
    """fixed: the 0-based layers skipped in every step."""
    granularity: Literal["step", "microbatch"] = "step"
    """Whether a step's micro-batches share one mask."""
    skipped_update: Literal["freeze", "zero_grad"] = "freeze"
    """Layers skipped in a whole step. freeze: weights and moments stay untouched; zero_grad: Adam sees a zero gradient."""
    residual_scale: Literal["none", "inverse_keep"] = "none"
    """inverse_keep: what a layer that runs adds to the residual stream is divided by 1 - p_l (stochastic depth)."""

    @model_validator(mode="after")
    def _probabilities(self) -> LdsConfig:
        largest = self.alpha * (1 + abs(self.epsilon)) if self.depth_profile != "flat" else self.alpha
        if largest > 1:
            raise ValueError(
                f"alpha*(1+|epsilon|) = {largest:g} > 1 (alpha={self.alpha:g}, epsilon={self.epsilon:g}): "
                "skip probabilities must stay <= 1; lower alpha or epsilon"
            )
        return self


class StageConfig(Section):
    """One training stage: what learns, on which data, how long, how sparsely."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """Addresses the stage in overrides and names its folders."""
    freeze: tuple[Part, ...] = ()
    """Parts of the model that do not learn."""
    data: DataConfig | None = None
    """None: the run's ``data``."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Length, in passes over the data; either this or ``steps``."""
    steps: PositiveInt | None = None
    """Length, in optimizer steps."""
    optimizer: OptimizerConfig
    """How what learns is updated."""
    batch: BatchConfig
    """Shapes of a step."""
    vtc: VtcConfig | None = None
    """Visual Token Compressor. None: the language model sees all tokens."""
    lds: LdsConfig | None = None
    """Layer Dynamic Skipper. None: every layer runs."""
    validation: ValidationConfig | None = None
    """None: nothing but the training loss is measured."""

    @model_validator(mode="after")
    def _length(self) -> StageConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"stage {self.name!r}: give exactly one of epochs and steps")
        return self


class EvaluationConfig(Section):
    """The accuracy measured on ``scenes`` when the last stage has ended."""

    num_questions: Annotated[int, Field(ge=0)] = 0
    """Questions a family; 0 turns evaluation off."""
    families: tuple[str, ...] = ("existence", "relation", "counting", "ocr", "choice", "paired")
    """Question families that are asked."""
    left_out_of_mean: tuple[str, ...] = ()
    """Families that are asked and shown, but not part of a comparison's mean: those the model cannot learn at its size."""
    splits: tuple[Literal["eval", "eval_heldout", "eval_style"], ...] = ("eval",)
    """eval: other scenes than in training; eval_heldout: objects that were never trained on; eval_style: another art style."""
    words: bool = False
    """Give the scene in words instead of the image (text-only models; the gate of the backbones)."""
    micro_batch_size: PositiveInt = 50
    """Questions answered at a time."""


class RunConfig(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Of all random numbers. Masks draw with it as a 64-bit key, which NumPy reads wrongly from 2^63 on.

    Random initial weights also depend on the number of pipeline ranks and chunks (on GPUs of tensor-parallel ranks too), which draw
    for themselves: runs that are to begin alike in several layouts need ``model.*.init``.
    """
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    kernels: KernelsConfig = KernelsConfig()
    data: DataConfig = DataConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _stage_names(self) -> RunConfig:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        return self
