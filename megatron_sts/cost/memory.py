"""Parameters of the whole model and of each rank, and the bytes of their state. Torch-free; knows nothing of activations.

Counts what megatron-core builds: matrices are split over tensor-parallel ranks, norms and the biases of row-split
matrices are whole on each, and so are a Hugging Face tower and a Q-Former; vision tower, Q-Former, projector and word
embedding live on the first pipeline rank, final norm and output head on the last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_sts.config.architecture import LanguageConfig, ModelConfig, Part, QFormerConfig, VisionConfig
from megatron_sts.config.resolve import Resolved, ResolvedStage


@dataclass(frozen=True)
class Parameters:
    """Parameters of one piece of the model."""

    split: int = 0
    """Those dealt out to tensor-parallel ranks."""
    whole: int = 0
    """Those that every tensor-parallel rank holds."""

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.split + other.split, self.whole + other.whole)

    def __mul__(self, count: int) -> Parameters:
        return Parameters(self.split * count, self.whole * count)

    @property
    def total(self) -> int:
        """Those of the unsplit model."""
        return self.split + self.whole

    def on_rank(self, tensor_parallel_size: int) -> int:
        """Those that one tensor-parallel rank holds."""
        return self.split // tensor_parallel_size + self.whole


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds throughout a stage. Activations and communication buffers come on top."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def parameters(resolved: Resolved) -> dict[Part, int]:
    """Parameters of each part that the model has."""
    model, language = resolved.config.model, resolved.config.model.language
    before = _before_decoder(resolved)
    decoder = _embedding(language) + _decoder_layer(language) * language.num_layers + _final(language)
    return {part: (decoder if part == "language" else before[part]).total for part in model.parts}


def parameters_per_rank(resolved: Resolved) -> list[int]:
    """Parameters that one (tensor-parallel) rank of each pipeline stage holds.

    Tied word embeddings are held by the first and the last stage.
    """
    return [_on_rank(resolved, rank, resolved.config.model.parts) for rank in range(_pipeline_size(resolved))]


def layer_parameters_per_rank(resolved: Resolved) -> int:
    """Parameters of one decoder layer that one tensor-parallel rank holds."""
    return _decoder_layer(resolved.config.model.language).on_rank(resolved.config.parallel.tensor_model_parallel_size)


def memory_per_rank(resolved: Resolved, stage: ResolvedStage) -> list[RankMemory]:
    """Bytes of weights, gradients and optimizer state on a rank of each pipeline stage.

    Gradients and optimizer state exist for parts that train. fp32: 4 bytes a weight, 4 a gradient, 8 of Adam moments.
    bf16: 2 a weight, 4 a gradient (summed in fp32), 12 for Adam moments and fp32 master weights. The distributed
    optimizer divides the last by the data-parallel size (Megatron-LM, distributed optimizer: 6 + 12/d bytes). Skipped layers
    free nothing of it.
    """
    is_fp32 = resolved.config.precision.params == "fp32"
    weight_bytes, optimizer_bytes = (4, 8) if is_fp32 else (2, 12)
    shards = resolved.data_parallel_size if resolved.config.parallel.use_distributed_optimizer else 1
    learning = [part for part in resolved.config.model.parts if part not in stage.config.freeze]
    memory = []
    for rank, held in enumerate(parameters_per_rank(resolved)):
        trained = _on_rank(resolved, rank, learning)
        memory.append(RankMemory(held * weight_bytes, trained * 4, -(-trained * optimizer_bytes // shards)))
    return memory


def _pipeline_size(resolved: Resolved) -> int:
    return resolved.config.parallel.pipeline_model_parallel_size


def _on_rank(resolved: Resolved, rank: int, parts: Collection[Part]) -> int:
    """Parameters of ``parts`` on one tensor-parallel rank of pipeline rank ``rank``."""
    model, is_first, is_last = resolved.config.model, rank == 0, rank == _pipeline_size(resolved) - 1
    held = Parameters()
    if is_first:
        held = sum((size for part, size in _before_decoder(resolved).items() if part in parts), held)
    if "language" in parts:
        held += _decoder_layer(model.language) * resolved.layer_owner.count(rank)
        held += _embedding(model.language) if is_first else Parameters()
        held += _final(model.language) if is_last else Parameters()
        if model.language.tie_word_embeddings and is_last and not is_first:
            held += _embedding(model.language)
    return held.on_rank(resolved.config.parallel.tensor_model_parallel_size)


def _decoder_layer(language: LanguageConfig) -> Parameters:
    """h d (a + 2g) + a d h of attention, d (a + 2g) of QKV biases, 3 h f of SwiGLU, two norms."""
    heads, hidden = language.num_attention_heads, language.hidden_size
    groups, channels = language.num_query_groups or heads, language.kv_channels or hidden // heads
    attention = 2 * hidden * channels * (heads + groups)
    biases = channels * (heads + 2 * groups) if language.add_qkv_bias else 0
    return Parameters(split=attention + biases + 3 * hidden * language.ffn_hidden_size, whole=2 * hidden)


def _embedding(language: LanguageConfig) -> Parameters:
    return Parameters(split=language.vocab_size * language.hidden_size)


def _final(language: LanguageConfig) -> Parameters:
    """Final norm, and the head unless it is the word embedding."""
    head = 0 if language.tie_word_embeddings else language.vocab_size * language.hidden_size
    return Parameters(split=head, whole=language.hidden_size)


def _before_decoder(resolved: Resolved) -> dict[Part, Parameters]:
    """Those of the parts that lie before the decoder."""
    model = resolved.config.model
    if model.vision is None:
        return {}
    vision = _vision(model.vision, resolved.num_vision_layers)
    if model.vision.tower == "hf":
        vision = Parameters(whole=vision.total)
    sizes: dict[Part, Parameters] = {"vision": vision, "projector": _projector(model, model.vision)}
    return sizes if model.qformer is None else {**sizes, "qformer": _qformer(model.qformer, model.vision)}


def _vision(vision: VisionConfig, num_layers: int) -> Parameters:
    """Patches, positions and what a tower has beside them, whole; then the layers, with biases.

    clip: class token, its position and the first norm; siglip: a bias of patches; hf: as BLIP-2's vision model, class token,
    its position, a bias of patches and, after the last layer, a norm. Other models of Hugging Face's differ a little.
    """
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size or 4 * vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    final_norm = 2 if vision.feature_layer == -1 else 0
    beside_patches = {"clip": 2 + 2, "siglip": 1, "hf": 3 + final_norm}[vision.tower]
    embedding = Parameters(whole=hidden * (3 * vision.patch_size**2 + patches + beside_patches))
    qkv_and_fc1 = 3 * hidden * (hidden + 1) + ffn * (hidden + 1)
    layer = Parameters(split=qkv_and_fc1 + hidden * hidden + ffn * hidden, whole=2 * hidden + 2 * 2 * hidden)
    return embedding + layer * num_layers


def _qformer(qformer: QFormerConfig, vision: VisionConfig) -> Parameters:
    """Queries and their norm; layers of attention and MLP, some with attention to features; biases and norms everywhere."""
    hidden, ffn = qformer.hidden_size, qformer.ffn_hidden_size or 4 * qformer.hidden_size
    layer = 4 * hidden * (hidden + 1) + ffn * (hidden + 1) + hidden * (ffn + 1) + 2 * 2 * hidden
    looking = 2 * hidden * (hidden + 1) + 2 * hidden * (vision.hidden_size + 1) + 2 * hidden
    num_looking = -(-qformer.num_layers // qformer.cross_attention_frequency)
    embedding = (qformer.num_query_tokens + 2) * hidden
    return Parameters(whole=embedding + qformer.num_layers * layer + num_looking * looking)


def _projector(model: ModelConfig, vision: VisionConfig) -> Parameters:
    """linear: one column-split matrix; mlp2x_gelu: a column-split and a row-split one; with biases."""
    hidden = model.language.hidden_size
    first = Parameters(split=hidden * ((model.qformer or vision).hidden_size + 1))
    return first if model.projector.type == "linear" else first + Parameters(split=hidden * hidden, whole=hidden)
