"""A script with ``LayerSkipper`` does what our trainer does: the same masks, losses and gradient norms, on the same weights and samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.adopt import LayerSkipper, LdsConfig
from megatron_sts.mcore.config import language_config
from megatron_sts.mcore.layer import TorchNorm
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.specs import torch_layer_spec
from megatron_sts.mcore.torch_ops import SwiGlu, TorchSelfAttention
from megatron_sts.model.init import build_model
from megatron_sts.model.loss import masked_loss
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.batches import StageBatches
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import BATCH, BERNOULLI, NUM_LAYERS, OPTIMIZER, resolved_run, written_run

NUM_STEPS = 4
DRAWN = {**BERNOULLI, "skipped_update": "zero_grad"}
"""Under ``freeze`` torch's Adam counts its steps of a layer in our trainer, and all steps in a script; they show when it runs again."""


@dataclass
class Trained:
    """By our trainer."""

    numbers: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of each step."""
    idle: list[tuple[bool, ...]] = field(default_factory=list)
    batches: list[list[Batch]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the language model, before the first step."""


@dataclass
class Recorded:
    """A stage's data, which also keeps them."""

    batches: StageBatches
    kept: list[list[Batch]]
    wait_s: float = 0.0
    balanced: None = None

    def step(self, step: int) -> list[Batch]:
        self.kept.append(self.batches.step(step))
        return self.kept[-1]

    def close(self) -> None:
        self.batches.close()


def by_our_trainer(resolved: Resolved) -> Trained:
    trained, gate = Trained(), SkipGate()
    chunks = build_model(resolved, gate)
    language = unwrap(chunks[0]).language
    trained.weights = {
        name: weight.detach().clone() for name, weight in language.state_dict().items() if weight is not None
    }
    stage = build_stage(resolved, resolved.stages[0], groups.place(), chunks, gate)
    stage = replace(stage, batches=Recorded(stage.batches, trained.batches))  # type: ignore[arg-type]
    for step in range(NUM_STEPS):
        result = train_step(stage, step)
        trained.numbers.append((result.loss, result.grad_norm))
        trained.idle.append(result.mask.idle)
    stage.close()
    return trained


def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
    batch = next(iterator)
    positions = batch.position_ids.unsqueeze(0).expand(3, -1, -1)
    losses = model(batch.tokens, positions, None, labels=batch.labels)
    return losses, partial(masked_loss, loss_mask=batch.loss_mask)


def by_script(resolved: Resolved, lds: LdsConfig, trained: Trained) -> tuple[list[tuple[float, float]], list[Any]]:
    """As a script would with megatron-core's ``TransformerLayer``, of the same kernels."""
    config, language = language_config(resolved), resolved.config.model.language
    skipper = LayerSkipper(config, lds, num_steps=NUM_STEPS, seed=resolved.config.seed)
    layer = torch_layer_spec(AttnMaskType.causal, attention=TorchSelfAttention, activation=SwiGlu)
    spec = skipper.layer_spec(TransformerBlockSubmodules(layer_specs=[layer] * NUM_LAYERS, layer_norm=TorchNorm))
    model = GPTModel(
        config,
        spec,
        language.vocab_size,
        256,
        position_embedding_type="mrope",
        rotary_base=language.rotary_base,
        share_embeddings_and_output_weights=False,
    )
    model.load_state_dict(trained.weights, strict=False)
    chunk = skipper.data_parallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    lr, decay = OPTIMIZER["lr"], OPTIMIZER["weight_decay"]
    first, second = resolved.stages[0].config.optimizer.betas
    adam = {"adam_beta1": first, "adam_beta2": second, "adam_eps": OPTIMIZER["eps"]}
    settings = OptimizerConfig(optimizer="adam", lr=lr, min_lr=0.0, weight_decay=decay, clip_grad=1.0, **adam)
    optimizer = get_megatron_optimizer(settings, [chunk])
    for group in optimizer.param_groups:
        group["fused"] = True  # as our trainer's, on CPU
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=0.0,
        lr_warmup_steps=OPTIMIZER["warmup_steps"],
        lr_decay_steps=NUM_STEPS,
        lr_decay_style="cosine",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    config.finalize_model_grads_func = finalize_model_grads
    run, numbers, idle = skipper.schedule([chunk], optimizer), [], []
    for batches in trained.batches:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = run(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=chunk,
            num_microbatches=len(batches),
            seq_length=batches[0].sequence_length,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        loss_sum, num_tokens = (sum(float(report[name]) for report in reports) for name in ("loss_sum", "num_tokens"))
        numbers.append((loss_sum / num_tokens, float(norm)))
        idle.append(skipper.mask.idle if skipper.mask else None)
    return numbers, idle


@pytest.mark.parametrize("lds", [DRAWN, {"sampler": "fixed", "fixed_layers": [1, 3]}], ids=["drawn", "fixed"])
def test_a_script_trains_as_our_trainer_does(lds: dict[str, Any], tmp_path: Path) -> None:
    stage = {
        "name": "one",
        "freeze": ["vision", "projector"],
        "steps": NUM_STEPS,
        "lds": lds,
        "batch": BATCH | {"sequence_length": 256},
    }
    written = written_run(tmp_path, stage, fresh=True) | {"data": {"source": "scenes", "mode": "induction"}}
    resolved = resolved_run(written)
    with process_group(60.0):
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        trained = by_our_trainer(resolved)
        numbers, idle = by_script(resolved, LdsConfig(**lds), trained)
        groups.destroy()
    assert idle == trained.idle and any(map(any, idle))
    assert numbers == trained.numbers
