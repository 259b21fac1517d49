"""Which Hugging Face tensors each of our weights holds: one table, read in both directions.

Left: our layout-free names (``mcore.weights``). Right: Hugging Face's names inside the part's own model (Llama and Qwen2;
CLIP's vision model; LLaVA's projector) and their shapes in the sizes of ``sizes_of``. Whole models prefix those names, see ``spelling``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sts.config.architecture import LanguageConfig, Part, VisionConfig
from megatron_sts.convert import replicated
from megatron_sts.convert.joining import Joining
from megatron_sts.convert.pairing import Pairing, Sections

Dims = tuple[str, ...]
"""Names of sizes, one a dimension."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``{layer}`` stands for every layer's number."""

    ours: str
    theirs: Mapping[str, Dims]
    joining: Joining = "same"
    groups: str = ""
    """grouped: the size that counts the groups."""
    viewed: Dims = ()
    """same: our shape, where it differs."""


def _linear(ours: str, theirs: str, out: str, into: str) -> tuple[Row, Row]:
    return Row(f"{ours}.weight", {f"{theirs}.weight": (out, into)}), Row(f"{ours}.bias", {f"{theirs}.bias": (out,)})


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return tuple(Row(f"{ours}.{kind}", {f"{theirs}.{kind}": ("hidden",)}) for kind in ("weight", "bias"))  # type: ignore[return-value]


def _qkv(ours: str, theirs: str, kind: str, into: Dims, groups: str) -> Row:
    """One matrix of ours holds, group after group, its queries, its key and its value."""
    sizes = {"q": "queries", "k": "keys", "v": "keys"}
    return Row(
        f"{ours}.{kind}",
        {f"{theirs}.{part}_proj.{kind}": (size, *into) for part, size in sizes.items()},
        "grouped",
        groups=groups,
    )


_DECODER, _LAYER = "language.decoder.layers.{layer}", "model.layers.{layer}"
LANGUAGE = (
    Row("language.embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocab", "hidden")}),
    Row(f"{_DECODER}.input_layernorm.weight", {f"{_LAYER}.input_layernorm.weight": ("hidden",)}),
    _qkv(f"{_DECODER}.self_attention.linear_qkv", f"{_LAYER}.self_attn", "weight", ("hidden",), "groups"),
    Row(f"{_DECODER}.self_attention.linear_proj.weight", {f"{_LAYER}.self_attn.o_proj.weight": ("hidden", "queries")}),
    Row(f"{_DECODER}.pre_mlp_layernorm.weight", {f"{_LAYER}.post_attention_layernorm.weight": ("hidden",)}),
    Row(
        f"{_DECODER}.mlp.linear_fc1.weight",
        {f"{_LAYER}.mlp.gate_proj.weight": ("ffn", "hidden"), f"{_LAYER}.mlp.up_proj.weight": ("ffn", "hidden")},
        "stacked",
    ),
    Row(f"{_DECODER}.mlp.linear_fc2.weight", {f"{_LAYER}.mlp.down_proj.weight": ("hidden", "ffn")}),
    Row("language.decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}),
)
QKV_BIAS = (_qkv(f"{_DECODER}.self_attention.linear_qkv", f"{_LAYER}.self_attn", "bias", (), "groups"),)
HEAD = (Row("language.output_layer.weight", {"lm_head.weight": ("vocab", "hidden")}),)
"""Absent where it is tied to the embedding."""
VOCABULARY = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")
"""What has a row for each token."""

_ENCODER, _BLOCK = "vision.encoder.decoder.layers.{layer}", "encoder.layers.{layer}"
VIT = (
    Row("vision.encoder.conv1.weight", {"embeddings.patch_embedding.weight": ("hidden", "channels", "patch", "patch")}),
    Row("vision.encoder.position_embeddings.weight", {"embeddings.position_embedding.weight": ("positions", "hidden")}),
    *_norm(f"{_ENCODER}.input_layernorm", f"{_BLOCK}.layer_norm1"),
    _qkv(f"{_ENCODER}.self_attention.linear_qkv", f"{_BLOCK}.self_attn", "weight", ("hidden",), "heads"),
    _qkv(f"{_ENCODER}.self_attention.linear_qkv", f"{_BLOCK}.self_attn", "bias", (), "heads"),
    *_linear(f"{_ENCODER}.self_attention.linear_proj", f"{_BLOCK}.self_attn.out_proj", "hidden", "hidden"),
    *_norm(f"{_ENCODER}.pre_mlp_layernorm", f"{_BLOCK}.layer_norm2"),
    *_linear(f"{_ENCODER}.mlp.linear_fc1", f"{_BLOCK}.mlp.fc1", "ffn", "hidden"),
    *_linear(f"{_ENCODER}.mlp.linear_fc2", f"{_BLOCK}.mlp.fc2", "hidden", "ffn"),
    # Built in no model of ours, kept for the way back; so are the layers after the projected one.
    *_norm("vision.encoder.ln_post", "post_layernorm"),
)
CLIP = (
    Row("vision.encoder.class_token", {"embeddings.class_embedding": ("hidden",)}, viewed=("one", "one", "hidden")),
    *_norm("vision.encoder.ln_pre", "pre_layrnorm"),
)

SIGLIP = (Row("vision.encoder.conv1.bias", {"embeddings.patch_embedding.bias": ("hidden",)}),)
SIGLIP_HEAD = (
    # Built in no model of ours, and not in all of theirs.
    Row("vision.encoder.head.probe", {"head.probe": ("one", "one", "hidden")}),
    Row("vision.encoder.head.in_proj.weight", {"head.attention.in_proj_weight": ("attention", "hidden")}),
    Row("vision.encoder.head.in_proj.bias", {"head.attention.in_proj_bias": ("attention",)}),
    *_linear("vision.encoder.head.out_proj", "head.attention.out_proj", "hidden", "hidden"),
    *_norm("vision.encoder.head.layernorm", "head.layernorm"),
    *_linear("vision.encoder.head.fc1", "head.mlp.fc1", "ffn", "hidden"),
    *_linear("vision.encoder.head.fc2", "head.mlp.fc2", "hidden", "ffn"),
)

LINEAR = _linear("projector.encoder", "projection", "projected", "seen")
MLP2X = (
    *_linear("projector.encoder.linear_fc1", "linear_1", "projected", "seen"),
    *_linear("projector.encoder.linear_fc2", "linear_2", "projected", "projected"),
)

NEWLINE = (Row("projector.newline", {"image_newline": ("projected",)}),)
"""Of pictures in tiles."""


def pairings(sections: Sections) -> list[Pairing]:
    """All weights of the given parts, whatever a run builds of them."""
    found: list[Pairing] = []
    if vision := sections.get("vision"):
        found += _vision(vision)
    if qformer := sections.get("qformer"):
        found += replicated.qformer(qformer, sections["vision"].hidden_size)
    if projector := sections.get("projector"):
        seen = sections["qformer" if "qformer" in sections else "vision"].hidden_size
        rows = {"linear": LINEAR, "mlp2x_gelu": MLP2X}[projector.type]
        rows += NEWLINE * (sections["vision"].tiles is not None)
        found += _expanded("projector", rows, {"seen": seen, "projected": sections["language"].hidden_size}, 0)
    if language := sections.get("language"):
        rows = LANGUAGE + QKV_BIAS * language.add_qkv_bias + HEAD * (not language.tie_word_embeddings)
        found += _expanded("language", rows, _language_sizes(language), language.num_layers)
    return found


def _vision(vision: VisionConfig) -> list[Pairing]:
    if vision.tower == "hf":
        return replicated.tower(vision)
    rows = VIT + (CLIP if vision.tower == "clip" else SIGLIP)
    found = _expanded("vision", rows, _vision_sizes(vision), vision.num_layers)
    if vision.tower == "siglip":
        head = _expanded("vision", SIGLIP_HEAD, _vision_sizes(vision), 0)
        found += [replace(pair, optional=True) for pair in head]
    return found


def _language_sizes(language: LanguageConfig) -> dict[str, int]:
    heads = language.num_attention_heads
    groups, width = language.num_query_groups or heads, language.kv_channels or language.hidden_size // heads
    return {
        "vocab": language.vocab_size,
        "hidden": language.hidden_size,
        "ffn": language.ffn_hidden_size,
        "groups": groups,
        "queries": heads * width,
        "keys": groups * width,
    }


def _vision_sizes(vision: VisionConfig) -> dict[str, int]:
    hidden = vision.hidden_size
    return {
        "one": 1,
        "channels": 3,
        "hidden": hidden,
        "ffn": vision.ffn_hidden_size or 4 * hidden,
        "patch": vision.patch_size,
        "positions": (vision.image_size // vision.patch_size) ** 2 + (vision.tower == "clip"),
        "heads": vision.num_attention_heads,
        "queries": hidden,
        "keys": hidden,
        "attention": 3 * hidden,
    }


def _expanded(part: Part, rows: tuple[Row, ...], sizes: Mapping[str, int], num_layers: int) -> list[Pairing]:
    """Layer after layer, as Hugging Face's shards have them; first what belongs to none."""
    found = [_pairing(part, row, 0, sizes) for row in rows if "{layer}" not in row.ours]
    for layer in range(num_layers):
        found += [_pairing(part, row, layer, sizes) for row in rows if "{layer}" in row.ours]
    return found


def _pairing(part: Part, row: Row, layer: int, sizes: Mapping[str, int]) -> Pairing:
    theirs = {name.format(layer=layer): tuple(sizes[dim] for dim in dims) for name, dims in row.theirs.items()}
    first, *_ = theirs.values()
    joined = (sum(shape[0] for shape in theirs.values()), *first[1:])
    shape = tuple(sizes[dim] for dim in row.viewed) or joined
    return Pairing(part, row.ours.format(layer=layer), shape, theirs, row.joining, sizes.get(row.groups, 1))
