"""Trains the same small model on the same samples in any parallel layout, and gathers what must not depend on it.

Ranks started by ``run_ranks`` do all layouts of a job one after the other in the same processes (an import costs more than
training); a test process does single-rank ones itself.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import is_gated, named_weights, save_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step

Written = dict[str, Any]
"""A config as it would be written in YAML."""

NUM_LAYERS = 4
OPTIMIZER = {"lr": 1e-3, "warmup_steps": 1, "weight_decay": 0.1, "eps": 1e-4}
"""A large eps: Adam divides a gradient that is only rounding noise by itself, which would make noise of the update too."""
BATCH = {"global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 72, "max_images": 2}
ALIGNMENT = {
    "name": "alignment",
    "freeze": ["vision", "language"],
    "steps": 4,
    "vtc": {"keep_ratio": 0.5, "sampler": "uniform"},
}
SKIPPING = {
    "name": "skipping",
    "freeze": ["vision"],
    "steps": 4,
    # Of four layers the middle two: on four stages, or as four virtual ones, two chunks in the middle have nothing to do.
    "lds": {"sampler": "fixed", "fixed_layers": [1, 2]},
}
DENSE = {"name": "dense", "steps": 2}
BERNOULLI = {"sampler": "bernoulli", "alpha": 0.5, "epsilon": 0.2, "schedule": "constant"}


MODELS: dict[str, dict[str, Written]] = {
    "plain": {},
    "tied": {"language": {"tie_word_embeddings": True}},
    "aligned": {"language": {"ffn_hidden_size": 192}},  # on two tensor-parallel ranks a multiple of 16, for FP8
    "tiles": {
        "vision": {"tiles": {"resolutions": [[32, 64], [64, 32], [64, 64]], "anyres_max": 1, "several": "squares"}}
    },
    "siglip": {
        "vision": {"tower": "siglip"},
        "language": {
            "add_qkv_bias": True,
            "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 48},
        },
    },
    "qformer": {
        "vision": {
            "tower": "hf",
            "hf_config": {"model_type": "clip_vision_model"},
            "ffn_hidden_size": 128,
            "pixel_mean": [0.5, 0.5, 0.5],
            "pixel_std": [0.25, 0.25, 0.25],
        },
        "qformer": {"num_query_tokens": 12, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
        "projector": {"type": "linear"},
    },
}
"""What the small model is given beside or instead of its usual sizes, by name."""


@dataclass
class Trained:
    """What training must give whatever the layout; lists have one entry a step, over all stages."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    masks: list[tuple[bool, ...]] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Whole weights: at the start and after each stage."""


def written_run(
    folder: Path, *stages: Written, model: str = "plain", fresh: bool = False, params: str = "fp32", **parallel: object
) -> Written:
    """A config of a small model on the samples and (unless ``fresh``) weights in ``folder``; ``parallel`` is the layout,
    with the tower on the first stage unless it says more."""
    parts = MODELS[model]
    vision = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    language = {"num_layers": NUM_LAYERS, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    language |= {"ffn_hidden_size": 176, "vocab_size": 1024}
    weights = folder / f"{model}.safetensors"
    init = {"init": str(weights)} if weights.exists() and not fresh else {}
    common = {"optimizer": OPTIMIZER, "batch": BATCH}
    return {
        "seed": 1,
        "model": {
            "vision": {**vision, "feature_layer": -1, **parts.get("vision", {}), **init},
            "qformer": {**parts["qformer"], **init} if "qformer" in parts else None,
            "projector": {**parts.get("projector", {}), **init},
            "language": {**language, **parts.get("language", {}), **init},
        },
        "precision": {"params": params},
        "data": {"source": "llava_json", "path": str(folder / "samples.json")},
        "parallel": {"vision": "first", **parallel},
        "stages": [{**common, **stage} for stage in stages or (ALIGNMENT, SKIPPING, DENSE)],
    }


def resolved_run(written: Written, world_size: int = 1) -> Resolved:
    return resolve(RunConfig.model_validate(written), world_size=world_size)


def write_inputs(folder: Path, models: Iterable[str] = ("plain",)) -> None:
    """Samples with no, one and two images, and random weights for models that are far from symmetric."""
    write_samples(folder)
    for model in models:
        write_weights(folder, model)


def write_weights(folder: Path, model: str) -> None:
    with process_group(60.0):
        resolved = resolved_run(written_run(folder, model=model))
        groups.initialize(resolved.config.parallel, seed=0)
        weights = dict(named_weights(build_model(resolved, SkipGate())))
        groups.destroy()
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = "norm" in name or "ln_pre" in name
        weights[name] = weight.detach() + 0.1 * noise if weight.dim() == 1 or is_norm else 0.1 * noise  # type: ignore[assignment]
    save_weights(weights, folder / f"{model}.safetensors", torch.float32)


def write_samples(folder: Path, num_samples: int = 24) -> None:
    """LLaVA's format. One sample in three has no image, so at two samples a rank some ranks see none in a whole step."""
    random = np.random.default_rng(0)
    words = ["the", "red", "cat", "is", "left", "of", "a", "big", "yellow", "car", "and", "two", "dogs"]
    entries = []
    for number in range(num_samples):
        names = [f"{number}-{i}.png" for i in range((1, 0, 2, 0, 1, 0)[number % 6])]
        for name in names:
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        question, answer = (" ".join(random.choice(words, random.integers(3, 7))) for _ in range(2))
        turns = [("human", "<image>" * len(names) + question), ("gpt", answer)]
        conversation = [{"from": role, "value": text} for role, text in turns]
        entries.append({"id": str(number), "image": names, "conversations": conversation})
    (folder / "samples.json").write_text(json.dumps(entries))


def train(resolved: Resolved) -> Trained:
    """All stages, as ``train.loop`` does them, in an initialised process group."""
    trained = Trained()
    place = groups.initialize(resolved.config.parallel, resolved.config.seed)
    try:
        gate = SkipGate()
        chunks = build_model(resolved, gate)
        trained.weights.append(gather_weights(chunks))
        for spec in resolved.stages:
            train_stage(build_stage(resolved, spec, place, chunks, gate), trained)
            trained.weights.append(gather_weights(chunks))
    finally:
        groups.destroy()
    return trained


def train_stage(stage: Stage, trained: Trained) -> None:
    for step in range(stage.spec.num_steps):
        before = skipped_state(stage, step)
        result = train_step(stage, step)
        check_frozen(stage, before, skipped_state(stage, step))
        trained.losses.append(result.loss)
        trained.grad_norms.append(result.grad_norm)
        trained.lrs.append(result.lr)
        trained.masks.append(result.mask.idle)
    stage.optimizer.close()


def skipped_state(stage: Stage, step: int) -> dict[tuple[int, int], list[torch.Tensor]]:
    """Copies of all that the optimizer keeps on this rank for the layers skipped in ``step``: weights, moments, counter."""
    states = {}
    for part in stage.optimizer.optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            states.update(part.optimizer.state)
    by_layer = stage.optimizer._update.layer_params
    return {
        (layer, number): [tensor.clone() for tensor in (parameter, *states[parameter].values())]
        for layer, skipped in enumerate(stage.mask(step).idle)
        for number, parameter in enumerate(by_layer.get(layer, ()))
        if skipped
    }


def check_frozen(stage: Stage, before: dict[Any, list[torch.Tensor]], after: dict[Any, list[torch.Tensor]]) -> None:
    """Under ``freeze`` nothing of a skipped layer moved; under ``zero_grad`` Adam's counter did."""
    for key, tensors in before.items():
        same = [torch.equal(*pair) for pair in zip(tensors, after[key], strict=True)]
        frozen = stage.spec.config.lds is not None and stage.spec.config.lds.skipped_update == "freeze"
        assert all(same) if frozen else not all(same), (key, same)


def gather_weights(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The whole model's weights on every rank. Checks that weights which ranks share are the same bit for bit."""
    here = groups.place()
    own = {
        name: (
            here.tp_rank,
            getattr(weight, "partition_dim", -1) if is_split(weight) else None,
            weight.detach().cpu().clone(),
        )
        for name, weight in named_weights(chunks)
    }
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    shards: dict[str, dict[int, torch.Tensor]] = {}
    dims: dict[str, int | None] = {}
    for of_rank in of_ranks:
        for name, (tp_rank, dims[name], shard) in of_rank.items():
            known = shards.setdefault(name, {}).setdefault(tp_rank if dims[name] is not None else 0, shard)
            assert torch.equal(known, shard), f"ranks disagree on {name}"
    return {
        name: join(name, [of_name[rank] for rank in sorted(of_name)], dims[name]) for name, of_name in shards.items()
    }


def is_split(weight: torch.nn.Parameter) -> bool:
    return groups.place().tp_size > 1 and getattr(weight, "tensor_model_parallel", False)


def join(name: str, shards: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    """Tensor-parallel shards back into one weight; the inverse of what ``weights.load_part`` reads."""
    if dim is None:
        return shards[0]
    if is_gated(name):
        halves = zip(*(shard.chunk(2, dim=dim) for shard in shards), strict=True)
        return torch.cat([torch.cat(half, dim=dim) for half in halves], dim=dim)
    return torch.cat(shards, dim=dim)


def train_alone(written: Written, resolve_run: Callable[[Written, int], Resolved] = resolved_run) -> Trained:
    """On one rank, in this process."""
    with process_group(60.0):
        return train(resolve_run(written, 1))


def train_layouts() -> None:
    """On each rank: trains every config in JOBS (JSON: name -> config) and leaves the results beside it."""
    with process_group(60.0):
        train_jobs()


def train_jobs(resolve_run: Callable[[Written, int], Resolved] = resolved_run) -> None:
    """As ``train_layouts``, in an initialised process group."""
    jobs = Path(os.environ["JOBS"])
    for name, written in json.loads(jobs.read_text()).items():
        trained = train(resolve_run(written, dist.get_world_size()))
        gc.collect()  # frees the gloo groups that the last model refers to, with their threads
        if dist.get_rank() == 0:
            torch.save(asdict(trained), jobs.with_name(f"{name}.pt"))
