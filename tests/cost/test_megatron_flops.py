"""Our FLOPs of a step against megatron.training's own formula."""

from __future__ import annotations

from argparse import Namespace

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import Causal, planned_load, step_flops

LENGTH = 8192
LLAMA_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "vocab_size": 128256,
}


def llama_8b() -> Resolved:
    """One row of LENGTH tokens a step, without a tower; everything trains."""
    stage = {
        "name": "only",
        "steps": 1,
        "optimizer": {"lr": 1.0},
        "batch": {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": LENGTH},
    }
    config = {"model": {"vision": None, "language": LLAMA_8B}, "data": {"mode": "words"}, "stages": [stage]}
    return resolve(RunConfig.model_validate(config))


def ours(causal: Causal) -> int:
    resolved = llama_8b()
    stage = resolved.stages[0]
    load = planned_load(resolved, stage, stage.uncompressed)
    return step_flops(resolved, stage, load, layers_executed=LLAMA_8B["num_layers"], causal=causal)


def megatrons() -> float:
    """``num_floating_point_operations``, asked for the same model as its command line would describe it."""
    from megatron.training.training import num_floating_point_operations

    args = Namespace(
        **{name: value for name, value in LLAMA_8B.items() if name != "vocab_size"},
        padded_vocab_size=LLAMA_8B["vocab_size"],
        kv_channels=LLAMA_8B["hidden_size"] // LLAMA_8B["num_attention_heads"],
        seq_length=LENGTH,
        group_query_attention=True,
        swiglu=True,
        attention_output_gate=False,
        multi_latent_attention=False,
        experimental_attention_variant=None,
        num_experts=None,
        moe_ffn_hidden_size=None,
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=None,
        mtp_num_layers=None,
        hybrid_layer_pattern=None,
    )
    return float(num_floating_point_operations(args, 1))


def test_a_step_of_llama_8b_counts_what_megatron_counts() -> None:
    # Both count half of the causal score matrix, our default; both leave out norms, activations and the embedding.
    assert ours("half") == megatrons() == 421_645_529_382_912


def test_the_other_half_of_the_scores_is_the_other_convention() -> None:
    scores = 4 * LENGTH**2 * LLAMA_8B["hidden_size"]
    assert ours("full") - ours("half") == 3 * LLAMA_8B["num_layers"] * scores // 2
