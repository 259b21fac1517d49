"""The weights of each piece of the model, tensor by tensor and in megatron-core's order. Torch-free; knows no ranks.

Matrices are split over tensor-parallel ranks, norms and the biases of row-split matrices are whole on each, and so are a
Hugging Face tower and a Q-Former, which count as one tensor each.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sts.config.architecture import LanguageConfig, ModelConfig, Part, QFormerConfig, VisionConfig
from megatron_sts.config.precision import Product


@dataclass(frozen=True)
class Weight:
    """One parameter tensor."""

    num_elements: int
    """Of the unsplit model."""
    is_split: bool = False
    """Whether tensor-parallel ranks share it out; else each holds all of it."""

    def on_rank(self, tensor_parallel_size: int) -> int:
        """Elements that one tensor-parallel rank holds."""
        return self.num_elements // tensor_parallel_size if self.is_split else self.num_elements


Weights = tuple[Weight, ...]


def num_elements(weights: Weights) -> int:
    """Of the unsplit model."""
    return sum(weight.num_elements for weight in weights)


def num_elements_on_rank(weights: Weights, tensor_parallel_size: int) -> int:
    """Those that one tensor-parallel rank holds."""
    return sum(weight.on_rank(tensor_parallel_size) for weight in weights)


def head_width(language: LanguageConfig) -> int:
    """Channels of one attention head."""
    return language.kv_channels or language.hidden_size // language.num_attention_heads


def num_groups(language: LanguageConfig) -> int:
    """Key/value heads."""
    return language.num_query_groups or language.num_attention_heads


def decoder_layer(language: LanguageConfig) -> Weights:
    """Norm; a d h of the attention's output; h d (a + 2g) of QKV and its d (a + 2g) biases; norm; 2 h f and f h of SwiGLU."""
    heads, hidden, ffn = language.num_attention_heads, language.hidden_size, language.ffn_hidden_size
    channels = head_width(language)
    qkv = channels * (heads + 2 * num_groups(language))
    bias = (Weight(qkv, is_split=True),) if language.add_qkv_bias else ()
    attention = (Weight(heads * channels * hidden, is_split=True), Weight(hidden * qkv, is_split=True), *bias)
    mlp = (Weight(2 * hidden * ffn, is_split=True), Weight(ffn * hidden, is_split=True))
    return (Weight(hidden), *attention, Weight(hidden), *mlp)


def products(language: LanguageConfig) -> dict[Product, Weight]:
    """The matrices of a decoder layer by the products that they are in."""
    proj, qkv, fc1, fc2 = (
        weight for weight in decoder_layer(language.model_copy(update={"add_qkv_bias": False})) if weight.is_split
    )
    return {"qkv": qkv, "proj": proj, "fc1": fc1, "fc2": fc2}


def embedding(language: LanguageConfig) -> Weights:
    """The word embedding; also a head that is tied to it."""
    return (Weight(language.vocab_size * language.hidden_size, is_split=True),)


def final_norm(language: LanguageConfig) -> Weights:
    """The norm before the head."""
    return (Weight(language.hidden_size),)


def head(language: LanguageConfig) -> Weights:
    """A head of its own; nothing if it is the word embedding."""
    return () if language.tie_word_embeddings else embedding(language)


def before_decoder(model: ModelConfig, num_vision_layers: int) -> dict[Part, Weights]:
    """Those of the parts that lie before the decoder, in megatron-core's order."""
    if model.vision is None:
        return {}
    vision = _vision(model.vision, num_vision_layers)
    if model.vision.tower == "hf":
        vision = (Weight(num_elements(vision)),)
    found: dict[Part, Weights] = {"vision": vision}
    if model.qformer is not None:
        found["qformer"] = _qformer(model.qformer, model.vision)
    return {**found, "projector": _projector(model, model.vision)}


def _vision(vision: VisionConfig, num_layers: int) -> Weights:
    """What a tower has beside its layers, whole; then the layers, with biases.

    clip: class token, the first norm, patches and positions; siglip: patches with a bias, positions; hf: as BLIP-2's vision model,
    class token, its position, a bias of patches and, after the last layer, a norm. Other models of Hugging Face's differ a little.
    """
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size or 4 * vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    pixels, norm = 3 * vision.patch_size**2 * hidden, (Weight(hidden), Weight(hidden))
    outside: Weights
    match vision.tower:
        case "clip":
            outside = (Weight(hidden), *norm, Weight(pixels), Weight((patches + 1) * hidden))
        case "siglip":
            outside = (Weight(pixels), Weight(hidden), Weight(patches * hidden))
        case "hf":
            positions = Weight((patches + 1) * hidden)
            last = norm if vision.feature_layer == -1 else ()
            outside = (Weight(hidden), Weight(pixels), Weight(hidden), positions, *last)
    attention = (
        Weight(hidden * hidden, is_split=True), Weight(hidden),
        Weight(3 * hidden * hidden, is_split=True), Weight(3 * hidden, is_split=True),
    )  # fmt: skip
    mlp = (
        Weight(hidden * ffn, is_split=True), Weight(ffn, is_split=True),
        Weight(ffn * hidden, is_split=True), Weight(hidden),
    )  # fmt: skip
    return outside + (*norm, *attention, *norm, *mlp) * num_layers


def _qformer(qformer: QFormerConfig, vision: VisionConfig) -> Weights:
    """Queries and their norm; layers of attention and MLP, some with attention to features; biases and norms everywhere."""
    hidden, ffn = qformer.hidden_size, qformer.ffn_hidden_size or 4 * qformer.hidden_size
    layer = 4 * hidden * (hidden + 1) + ffn * (hidden + 1) + hidden * (ffn + 1) + 2 * 2 * hidden
    looking = 2 * hidden * (hidden + 1) + 2 * hidden * (vision.hidden_size + 1) + 2 * hidden
    num_looking = -(-qformer.num_layers // qformer.cross_attention_frequency)
    outside = (qformer.num_query_tokens + 2) * hidden
    return (Weight(outside + qformer.num_layers * layer + num_looking * looking),)


def _projector(model: ModelConfig, vision: VisionConfig) -> Weights:
    """With tiles the newline. linear: one column-split matrix; mlp2x_gelu: a column-split and a row-split one; with biases."""
    hidden, features = model.language.hidden_size, (model.qformer or vision).hidden_size
    first = (Weight(features * hidden, is_split=True), Weight(hidden, is_split=True))
    second = () if model.projector.type == "linear" else (Weight(hidden * hidden, is_split=True), Weight(hidden))
    newline = (Weight(hidden),) if vision.tiles is not None else ()
    return (*newline, *first, *second)
