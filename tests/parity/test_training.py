"""Twenty steps of training move the weights as Hugging Face's models under torch's AdamW: dense, with VTC, with LDS; both stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.batch import Batch
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from tests.parity.hf import (
    NUM_KEPT,
    NUM_PATCHES,
    WEIGHTS,
    build_like,
    composed_loss,
    hf_clip,
    hf_decoder,
    hf_projector,
    make_batch,
    relative,
    resolved_model,
    tower_features,
)

NUM_STEPS = 20
VOCAB_SIZE = 1024
"""As a stage's tokenizer wants it; the batches use the first 256."""
# 5 x the largest difference measured. Losses are sums in another order, of weights that differ by the steps before. A weight's
# update is compared with the largest update of its tensor: it has the gradients' differences, which Adam's division leaves.
LOSS_RTOL, UPDATE_RTOL = 5 * 5.7e-7, 5 * 1.6e-4
OPTIMIZER = {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1e-4}
"""A large eps: Adam divides a gradient that is only rounding noise by itself, which would make noise of the update too."""
ALIGNMENT, FINETUNE = ("vision", "language"), ("vision",)
LDS = {"sampler": "bernoulli", "alpha": 0.5, "epsilon": 0.5}


@dataclass(frozen=True)
class Given:
    """In place of a stage's data: a batch a step."""

    batches: list[Batch]
    wait_s: float = 0.0
    balanced: None = None

    def step(self, step: int) -> list[Batch]:
        return [self.batches[step]]


def resolved_run(freeze: tuple[str, ...], keep_ratio: float, lds: dict[str, Any] | None) -> Resolved:
    written = resolved_model(
        feature_layer=-2, keep_ratio=keep_ratio, language={"vocab_size": VOCAB_SIZE}
    ).config.model_dump()
    [stage] = written["stages"]
    stage |= {"freeze": freeze, "steps": NUM_STEPS, "optimizer": OPTIMIZER, "lds": lds}
    return resolve(RunConfig.model_validate(written))


class Reference:
    """CLIP, projector and Llama of transformers and torch, trained by hand."""

    def __init__(self, freeze: tuple[str, ...]) -> None:
        self.parts = {
            "vision": hf_clip(),
            "projector": hf_projector(),
            "language": hf_decoder(LlamaForCausalLM, LlamaConfig, vocab_size=VOCAB_SIZE),
        }
        self._layers = self.parts["language"].model.layers
        for part in freeze:
            self.parts[part].requires_grad_(False)
        self._trained = [p for part in self.parts.values() for p in part.parameters() if p.requires_grad]
        decay = [p for p in self._trained if p.dim() > 1]
        others = [p for p in self._trained if p.dim() <= 1]  # vectors do not decay, as everywhere in this field
        self._optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            lr=OPTIMIZER["lr"],
            betas=(0.9, 0.95),
            eps=OPTIMIZER["eps"],
        )

    def step(self, batch: Batch, skipped: tuple[bool, ...]) -> float:
        """A skipped layer is not there: the identity, and no gradient."""
        language = self.parts["language"]
        runs = [layer for layer, skips in zip(self._layers, skipped, strict=True) if not skips]
        language.model.layers = torch.nn.ModuleList(runs)
        visual = None
        if batch.pixels is not None:
            visual = self.parts["projector"](tower_features(self.parts["vision"], batch.pixels, -2))
        loss = composed_loss(visual, language, batch) / batch.loss_mask.sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        language.model.layers = self._layers
        torch.nn.utils.clip_grad_norm_(self._trained, OPTIMIZER["clip_grad"])
        self._optimizer.step()
        return float(loss.detach())

    def weight(self, name: str) -> torch.Tensor:
        part = name.split(".")[0]
        return WEIGHTS[part](name, dict(self.parts[part].named_parameters())).detach().clone()


@pytest.mark.parametrize("freeze", [ALIGNMENT, FINETUNE], ids=["alignment", "fine-tuning"])
@pytest.mark.parametrize("keep_ratio", [1.0, NUM_KEPT / NUM_PATCHES], ids=["all tokens", "VTC"])
@pytest.mark.parametrize("lds", [None, LDS], ids=["all layers", "LDS"])
def test_twenty_steps(
    one_rank: None,
    freeze: tuple[str, ...],
    keep_ratio: float,
    lds: dict[str, Any] | None,
) -> None:
    reference, resolved = Reference(freeze), resolved_run(freeze, keep_ratio, lds)
    model = build_like(resolved, **reference.parts)
    start = {name: weight.detach().clone() for name, weight in named_weights([model])}
    batches = [make_batch(resolved, [1, 0, 2, step % 3], seed=step) for step in range(NUM_STEPS)]
    gate = model.language.decoder.layers[0].gate
    stage = replace(
        build_stage(resolved, resolved.stages[0], groups.place(), [model], gate),
        batches=Given(batches),  # type: ignore[arg-type]
    )
    loss = 0.0
    num_skipped = 0
    for step, batch in enumerate(batches):
        result = train_step(stage, step)
        expected = reference.step(batch, result.mask.idle)
        loss = max(loss, abs(result.loss - expected) / expected)
        num_skipped += result.mask.num_skipped
    assert (num_skipped > 0) == (lds is not None)
    update = 0.0
    for name, weight in named_weights([model]):
        moved = reference.weight(name).view_as(weight) - start[name]
        if name.split(".")[0] in freeze:
            assert torch.equal(weight, start[name]), name
        else:
            assert moved.any(), name
            update = max(update, relative(weight.detach() - start[name], moved))
    print(f"loss {loss:.1e}, update {update:.1e}")
    stage.optimizer.close()
    assert loss <= LOSS_RTOL and update <= UPDATE_RTOL
