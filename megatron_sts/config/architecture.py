"""The ``model`` section of a config: which architecture is built. Torch-free; knows nothing of runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from megatron_sts.config.section import Deviation, Epsilon, Fraction, PositiveInt, Section

Part = Literal["vision", "qformer", "projector", "language"]
Processing = Literal["pad", "crop", "squash"]
Resample = Literal["bicubic", "bilinear"]

Spread = Annotated[float, Field(ge=1e-3, le=1e3)]
"""What pixels are divided by; published ones lie between 0.2 and 1."""

HF_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""What Hugging Face's vision configs call the sizes of a ViT."""


class TilesConfig(Section):
    """Pictures seen whole and in tiles (AnyRes): the tower sees an overview and each tile, a square of ``image_size`` each; the tokens of
    the tiles stand row by row, as the picture has them, without what lies in its padding, and a learned newline token ends each row.

    With the resolutions of LLaVA-NeXT (arXiv 2310.03744, section 5.1) or of LLaVA-OneVision (arXiv 2408.03326)."""

    resolutions: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1)]
    """(height, width) in pixels, multiples of ``image_size``: a picture is scaled to the one that leaves most of its pixels, of such
    the smallest, and padded (transformers: image_grid_pinpoints)."""
    anyres_max: PositiveInt | None = None
    """Rows of more than 1.21 x so many tiles' tokens are interpolated to about so many (LLaVA-OneVision: anyres_max_9). None: never
    (LLaVA-NeXT)."""
    several: Literal["tiles", "squares"] = "tiles"
    """Pictures of a sample that has several. tiles: each in tiles (LLaVA-NeXT); squares: each padded to one square, with a newline token
    behind it (LLaVA-OneVision)."""


class VisionConfig(Section):
    """A ViT: the tower that turns pictures into features."""

    tower: Literal["clip", "siglip", "hf"] = "clip"
    """clip: class token, a norm before the layers, quick-GELU; siglip: none of these, a biased patch embedding, tanh-GELU;
    hf: any Hugging Face ViT, built from ``hf_config`` and whole on each tensor-parallel rank."""
    hf_config: dict[str, Any] | None = None
    """hf: the content of the model's config.json. The sizes below are taken from it unless it leaves them out."""
    num_layers: PositiveInt
    """Transformer layers of the whole tower, those after ``feature_layer`` counted."""
    hidden_size: PositiveInt
    """Width of its features."""
    num_attention_heads: PositiveInt
    """Query heads of a layer."""
    ffn_hidden_size: PositiveInt | None = None
    """Defaults to 4 x hidden_size."""
    image_size: PositiveInt
    """Pixels, square."""
    patch_size: PositiveInt
    """Pixels, square; must divide image_size in clip. Others leave out pixels at the right and bottom that fill no patch."""
    norm_epsilon: Epsilon | None = None
    """clip, siglip: defaults to 1e-5 and 1e-6."""
    pixel_mean: tuple[Fraction, Fraction, Fraction] | None = None
    """Of each channel, for pixels in [0, 1]. clip, siglip: defaults to the published ones."""
    pixel_std: tuple[Spread, Spread, Spread] | None = None
    """As ``pixel_mean``."""
    processing: Processing | None = None
    """How a picture becomes a square. pad: filled up with the mean colour, then resized (LLaVA-1.5); crop: resized to the shorter
    side, the ends of the longer one cut off (CLIP); squash: resized without regard to its shape (SigLIP, BLIP-2). Conversion takes
    a whole model's from its image processor, an export has it again. None: pad; refused if the weights say otherwise."""
    resample: Resample | None = None
    """Interpolation of pictures that are resized. None: bicubic; refused if the weights say otherwise."""
    tiles: TilesConfig | None = None
    """How pictures are cut into tiles. None: each is one square."""
    feature_layer: int = -2
    """Which layer's output is projected: -1 the last, -2 the one before (LLaVA-1.5). Layers after it are not built.

    No norm follows it, except with an hf tower's last layer, whose output is what the model returns.
    """
    init: str | None = None
    """Weights to start from: ``tiny/vision`` (embedded), a weights folder, a safetensors file, or another run: a checkpoint of
    it, its folder (the newest checkpoint) or RUN_DIR/checkpoints/STAGE (the one at that stage's end). Optimizer and schedules
    begin anew. A run that goes on from its own checkpoint reads none of it. None: random."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, data: object) -> object:
        if not isinstance(data, dict) or not isinstance(hf_config := data.get("hf_config"), dict):
            return data
        read = {field: hf_config[name] for field, name in HF_SIZES.items() if hf_config.get(name) is not None}
        for field in read.keys() & data.keys():
            if data[field] not in (read[field], None):
                raise ValueError(f"{field}={data[field]}: hf_config says {read[field]}; remove it")
        return {**data, **read}


class QFormerConfig(Section):
    """BLIP-2's Q-Former (arXiv 2301.12597): learned queries attend to an image's features, those of CLIP-type class tokens
    too. The defaults are its published sizes. It is whole on each tensor-parallel rank."""

    num_query_tokens: PositiveInt = 32
    """Visual tokens of an image."""
    num_layers: PositiveInt = 12
    """Transformer layers."""
    hidden_size: PositiveInt = 768
    """Width of its features."""
    num_attention_heads: PositiveInt = 12
    """Query heads of a layer."""
    ffn_hidden_size: PositiveInt | None = None
    """Defaults to 4 x hidden_size."""
    cross_attention_frequency: PositiveInt = 2
    """Layers 0, n, 2n, ... attend to the image."""
    init: str | None = None
    """As ``vision.init``, or ``tiny/qformer`` (embedded)."""


class ProjectorConfig(Section):
    """Maps visual features to the language model's width."""

    type: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """linear: one matrix with a bias (MiniGPT-4); mlp2x_gelu: two with a GELU between them (LLaVA-1.5)."""
    init: str | None = None
    """As ``vision.init``, but none are embedded."""


class RopeScalingConfig(Section):
    """Llama 3.1's scaling of RoPE to longer sequences than ``original_max_position_embeddings``."""

    factor: Annotated[float, Field(ge=1)]
    """Wavelengths that do not fit the original length so many times over become longer by this."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Wavelengths above original length / this are scaled in full."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below original length / this stay; between both it is interpolated."""
    original_max_position_embeddings: PositiveInt = 8192
    """Tokens of the longest row before the scaling."""

    @model_validator(mode="after")
    def _order(self) -> RopeScalingConfig:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} must be below high_freq_factor={self.high_freq_factor:g}"
            )
        return self


class LanguageConfig(Section):
    """A Llama-type decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    num_layers: PositiveInt
    """Decoder layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads of a layer."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads. Defaults to num_attention_heads (no grouping)."""
    ffn_hidden_size: PositiveInt
    """Width between the matrices of a feed-forward block (SwiGLU)."""
    kv_channels: PositiveInt | None = None
    """Width of one attention head. Defaults to hidden_size / num_attention_heads."""
    vocab_size: PositiveInt
    """May be larger than that of the weights in ``init``, for new tokens or to divide by the tensor-parallel size: further
    rows are the mean of all, so that their logits are never the largest. An export leaves out those that no token names."""
    add_qkv_bias: bool = False
    """Biases of the query, key and value projections (Qwen2)."""
    rotary_base: PositiveInt = 10000
    """RoPE's base (Hugging Face: rope_theta)."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of RoPE to longer sequences. None: none."""
    norm_epsilon: Epsilon = 1e-5
    """RMSNorm's."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding's matrix."""
    init_std: Deviation = 0.02
    """Standard deviation of the initial weights (output layers of a block: divided by sqrt(2 x num_layers))."""
    embedding_init_std: Deviation | None = None
    """Defaults to init_std."""
    init: str | None = None
    """As ``vision.init``, or ``tiny/language`` (embedded)."""


class ModelConfig(Section):
    """Vision tower, projector and language model; ``vision: null`` is a text-only language model."""

    vision: VisionConfig | None
    qformer: QFormerConfig | None = None
    """Between tower and projector (MiniGPT-4, BLIP-2). None: the tower's patches are projected (LLaVA)."""
    projector: ProjectorConfig = ProjectorConfig()
    language: LanguageConfig

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that the model has, in the order in which data pass."""
        if self.vision is None:
            return ("language",)
        return ("vision", "projector", "language") if self.qformer is None else get_args(Part)
