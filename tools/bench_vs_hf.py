"""A training step of the same LLaVA here and in Hugging Face transformers: dense, and with STS.

    python tools/bench_vs_hf.py [--json]

transformers builds a LLaVA with random weights (SDPA attention, frozen vision tower, fused AdamW, clipped gradients); ours are
converted from it, and the first dense losses must agree. Then steps on the same samples alternate in one process, and the
ratio of their times, ours / theirs, is the median over pairs. With STS ours keeps half of the visual tokens and skips a
quarter of the layers, against the same dense step of theirs; flops_ratio_sts is what that executes of the dense FLOPs. One
CPU thread. Seconds never leave a run: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fixed_steps import GivenBatches, GivenMask, step_seconds
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import LdsConfig, RunConfig
from megatron_sts.convert.hf_to_sts import convert, whole
from megatron_sts.cost.flops import TokenLoad, step_flops
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.feed import Feed
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step

VISION = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 256, "image_size": 96}
PATCH_SIZE, FEATURE_LAYER = 8, -2
MICRO_BATCH_SIZE, NUM_MICROBATCHES = 4, 2
LEARNING_RATE, BETAS, CLIP_GRAD = 1e-4, (0.9, 0.95), 1.0
KEEP_RATIO, SKIP_FRACTION = 0.5, 0.25
LOSS_RTOL = 1e-4
"""Of the first dense losses: fp32 sums in another order, 1e-6 in the parity tests of small models, more layers here."""


def hf_model(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """A decoder that dwarfs the tower before it."""
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        num_hidden_layers=VISION["num_layers"],
        hidden_size=VISION["hidden_size"],
        intermediate_size=VISION["ffn_hidden_size"],
        num_attention_heads=VISION["num_attention_heads"],
        image_size=VISION["image_size"],
        patch_size=PATCH_SIZE,
    )
    hidden = args.hidden_size
    llama = LlamaConfig(
        num_hidden_layers=args.num_layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=hidden * 11 // 4,
        vocab_size=args.vocab_size,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=clip,
        text_config=llama,
        image_token_index=4,
        image_seq_length=(VISION["image_size"] // PATCH_SIZE) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


class HfStep:
    """What a plain training loop does with transformers: accumulate micro-batches, clip, AdamW."""

    def __init__(self, model: LlavaForConditionalGeneration, batches: list[Batch]) -> None:
        self._model = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, weight_decay=0.0, fused=True
        )
        self._inputs = [_hf_inputs(batch) for batch in batches]
        self._num_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)

    def __call__(self) -> float:
        """One step; returns its loss a token."""
        self._optimizer.zero_grad()
        total = 0.0
        for inputs in self._inputs:
            loss = self._model(**inputs, num_items_in_batch=self._num_tokens).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._trained, CLIP_GRAD)
        self._optimizer.step()
        return total

    def seconds(self) -> float:
        started = time.perf_counter()
        self()
        current_device().synchronize()
        return time.perf_counter() - started


def _hf_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """transformers predicts the token behind each place, ours are told what comes there."""
    assert batch.pixels is not None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    labels = torch.full_like(batch.tokens, -100)
    told = batch.loss_mask[:, :-1].bool()
    labels[:, 1:][told] = batch.labels[:, :-1][told]
    return {"input_ids": batch.tokens, "pixel_values": (batch.pixels / 255 - mean) / std, "labels": labels}


def resolved_run(args: argparse.Namespace, weights: Path, keep_ratio: float) -> Resolved:
    """The same model, started from the converted weights, on drawn scenes of 144 visual tokens."""
    hidden, init = args.hidden_size, str(weights)
    vision = {**VISION, "patch_size": PATCH_SIZE, "feature_layer": FEATURE_LAYER, "init": init}
    language = {
        "num_layers": args.num_layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "ffn_hidden_size": hidden * 11 // 4,
        "vocab_size": args.vocab_size,
        "norm_epsilon": 1e-6,
        "init": init,
    }
    batch = {"global_batch_size": MICRO_BATCH_SIZE * NUM_MICROBATCHES, "micro_batch_size": MICRO_BATCH_SIZE}
    stage = {
        "name": "finetune",
        "freeze": ["vision"],
        "steps": 1,
        "optimizer": {"lr": LEARNING_RATE, "betas": BETAS, "clip_grad": CLIP_GRAD, "schedule": "constant"},
        "batch": {**batch, "sequence_length": args.sequence_length},
        "vtc": {"keep_ratio": keep_ratio},
        "lds": {},
    }
    model = {"vision": vision, "projector": {"init": init}, "language": language}
    data = {"mode": "questions", "num_turns": 8}
    return resolve(RunConfig.model_validate({"model": model, "data": data, "stages": [stage]}))


def bench(args: argparse.Namespace) -> dict[str, Any]:
    theirs = hf_model(args)
    with tempfile.TemporaryDirectory() as folder:
        hf, sts = Path(folder) / "hf", Path(folder) / "sts"
        theirs.save_pretrained(hf)
        convert(whole(hf), sts)
        dense, compressed = (resolved_run(args, sts, ratio) for ratio in (1.0, KEEP_RATIO))
        place, gate = groups.initialize(dense.config.parallel, seed=1), SkipGate()
        stage = build_stage(dense, dense.stages[0], place, build_model(dense, gate), gate)
        batches, fewer = (Feed(run, run.stages[0], place).step(0).batches for run in (dense, compressed))
    all_layers, mask = dense_mask(0, 0, args.num_layers), quarter_skipped(dense)
    step = HfStep(theirs, batches)
    ours_dense, ours_sts = partial(step_seconds, stage, batches, all_layers), partial(step_seconds, stage, fewer, mask)
    difference = first_losses_differ(stage, batches, all_layers, step)
    ours_sts()
    pairs = [(step.seconds(), ours_dense(), ours_sts()) for _ in range(args.num_pairs)]
    whole_flops, executed = flops(stage, batches, all_layers), flops(stage, fewer, mask)
    stage.close()
    return {
        "device": current_device().name,
        "ratio_dense": statistics.median(dense / hf for hf, dense, _ in pairs),
        "ratio_sts": statistics.median(sts / hf for hf, _, sts in pairs),
        "flops_ratio_sts": executed / whole_flops,
        "pairs": [{"dense": dense / hf, "sts": sts / hf} for hf, dense, sts in pairs],
        "first_loss_difference": difference,
    }


def quarter_skipped(resolved: Resolved) -> SkipMask:
    """A mask with that share of the layers."""
    lds = LdsConfig(sampler="balanced", alpha=SKIP_FRACTION, epsilon=0.0, schedule="constant")
    return draw_mask(lds, 1, 0, 0, 1, placement(resolved, resolved.stages[0]))


def first_losses_differ(stage: Stage, batches: list[Batch], mask: SkipMask, step: HfStep) -> float:
    """How much, relative to theirs; both have then made one step.

    Raises:
        RuntimeError: more than rounding explains: they would not be doing the same work.
    """
    fixed: Any = {"batches": GivenBatches(batches), "masks": GivenMask(mask)}
    ours, theirs = train_step(replace(stage, **fixed), 0).loss, step()
    difference = abs(ours - theirs) / theirs
    if difference > LOSS_RTOL:
        raise RuntimeError(f"first loss {ours:.6f}, transformers' {theirs:.6f}: not the same model")
    return difference


def flops(stage: Stage, batches: list[Batch], mask: SkipMask) -> int:
    """Executed in one step."""
    load = sum((batch.load for batch in batches), TokenLoad())
    return step_flops(stage.resolved, stage.spec, load, layers_executed=stage.num_layers - mask.num_skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens a sample, 144 visual ones included")
    parser.add_argument("--num-pairs", type=int, default=8, help="times that each step is timed")
    args = parser.parse_args()
    with process_group(600.0):
        found = bench(args)
    print(json.dumps(found)) if args.json else print_table(found)


def print_table(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"ours / transformers, step time on {found['device']}: median of {len(found['pairs'])} pairs")
    console.print(f"dense {found['ratio_dense']:.3f}")
    console.print(f"STS {found['ratio_sts']:.3f}, with {found['flops_ratio_sts']:.3f} of the dense FLOPs")


if __name__ == "__main__":
    main()
