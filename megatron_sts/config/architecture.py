"""The ``model`` section of a config: which architecture is built. Torch-free; knows nothing of runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_sts.config.section import PositiveInt, Section

Part = Literal["vision", "projector", "language"]


class VisionConfig(Section):
    """A ViT. ``clip`` and ``siglip`` are split over tensor-parallel ranks; ``hf`` is whole on each of them."""

    tower: Literal["clip", "siglip", "hf"] = "clip"
    """clip: class token, a norm before the layers, quick-GELU; siglip: none of these, a biased patch embedding, tanh-GELU;
    hf: any Hugging Face ViT, built from ``hf_config``."""
    hf_config: dict[str, Any] | None = None
    """hf: the content of the model's config.json. The sizes below are taken from it unless it leaves them out."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    ffn_hidden_size: PositiveInt | None = None
    """Defaults to 4 x hidden_size."""
    image_size: PositiveInt
    """Pixels, square."""
    patch_size: PositiveInt
    """Pixels, square; must divide image_size."""
    norm_epsilon: float | None = None
    """clip, siglip: defaults to 1e-5 and 1e-6."""
    pixel_mean: tuple[float, float, float] | None = None
    """Of each channel, for pixels in [0, 1]. clip, siglip: defaults to the published ones."""
    pixel_std: tuple[float, float, float] | None = None
    """As ``pixel_mean``."""
    feature_layer: int = -2
    """Which layer's output is projected: -1 the last, -2 the one before (LLaVA-1.5). Layers after it are not built.

    No norm follows it, except with an hf tower's last layer, whose output is what the model returns.
    """
    init: str | None = None
    """Weights to start from: ``tiny/vision`` (embedded), a weights folder or a safetensors file. None: random."""


class QFormerConfig(Section):
    """BLIP-2's Q-Former (arXiv 2301.12597): learned queries that attend to an image's features. Defaults: its size."""

    num_query_tokens: PositiveInt = 32
    """Visual tokens of an image."""
    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    ffn_hidden_size: PositiveInt | None = None
    """Defaults to 4 x hidden_size."""
    cross_attention_frequency: PositiveInt = 2
    """Layers 0, n, 2n, ... attend to the image."""


class ProjectorConfig(Section):
    """Maps visual features to the language model's width."""

    type: Literal["linear", "mlp2x_gelu", "qformer"] = "mlp2x_gelu"
    """qformer: a Q-Former and one linear layer (MiniGPT-4), whole on each tensor-parallel rank."""
    qformer: QFormerConfig = QFormerConfig()
    """qformer: its sizes."""
    init: str | None = None
    """Weights to start from: a weights folder or a safetensors file. None: random."""


class RopeScalingConfig(Section):
    """Llama 3.1's scaling of RoPE to longer sequences than ``original_max_position_embeddings``."""

    factor: Annotated[float, Field(ge=1)]
    """Wavelengths that do not fit the original length so many times over become longer by this."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Wavelengths above original length / this are scaled in full."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below original length / this stay; between both it is interpolated."""
    original_max_position_embeddings: PositiveInt = 8192
    """Tokens."""

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
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key/value heads. Defaults to num_attention_heads (no grouping)."""
    ffn_hidden_size: PositiveInt
    kv_channels: PositiveInt | None = None
    """Width of one attention head. Defaults to hidden_size / num_attention_heads."""
    vocab_size: PositiveInt
    add_qkv_bias: bool = False
    """Biases of the query, key and value projections (Qwen2)."""
    rotary_base: PositiveInt = 10000
    rope_scaling: RopeScalingConfig | None = None
    norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    init_std: float = 0.02
    """Standard deviation of the initial weights (output layers of a block: divided by sqrt(2 x num_layers))."""
    embedding_init_std: float | None = None
    """Defaults to init_std."""
    init: str | None = None
    """Weights to start from: ``tiny/language`` (embedded), a weights folder or a safetensors file. None: random."""


class ModelConfig(Section):
    """Vision tower, projector and language model; ``vision: null`` is a text-only language model."""

    vision: VisionConfig | None
    projector: ProjectorConfig = ProjectorConfig()
    language: LanguageConfig
