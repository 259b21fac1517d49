"""How much of the FLOPs that VTC saves arrives as wall-clock and memory, in alignment or in fine-tuning on tiles.

    python tools/bench_vtc.py [--tiles] [--json]

Steps with all visual tokens and with a share of them alternate in one run, on the same samples and weights, with the language
model frozen; with --tiles everything learns, and each picture is an overview and four tiles, as LLaVA-NeXT's largest. ideal_saving is 1 - executed / dense FLOPs; realised_saving is 1 - their time / that of the dense steps between
them; efficiency is realised / ideal. saved_bytes are those of the tensors that a micro-batch keeps for its backward pass.
One CPU thread. Seconds never leave a run: compare ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fixed_steps import step_seconds
from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import TokenLoad, step_flops
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.feed import Feed
from megatron_sts.train.stage import Stage, build_stage

KEEP_RATIOS = (1.0, 0.75, 0.5, 0.25, 0.1)
NUM_MICROBATCHES = 2
TILES = {"resolutions": [[192, 192]]}
"""Four of 96 pixels: 24 rows of 24 tokens and a newline, beside the overview's 144."""


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that are kept for the backward pass, those of parameters left out."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage  # held, so that no later one gets its address
        return tensor


def resolved_run(args: argparse.Namespace, keep_ratio: float) -> Resolved:
    """A decoder that dwarfs the tower before it, on drawn scenes of 96 pixels: 144 visual tokens, or in tiles 744."""
    hidden, size = args.hidden_size, 1 if args.tiles else 4
    vision = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "image_size": 96, "patch_size": 8}
    vision |= {"tiles": TILES if args.tiles else None}
    language = {"num_layers": args.num_layers, "hidden_size": hidden, "num_attention_heads": max(hidden // 64, 2)}
    batch = {"global_batch_size": size * NUM_MICROBATCHES, "micro_batch_size": size}
    stage = {
        "name": "finetune" if args.tiles else "alignment",
        "freeze": [] if args.tiles else ["vision", "language"],
        "steps": 1,
        "optimizer": {"lr": 1e-4},
        "batch": {**batch, "sequence_length": args.sequence_length or (800 if args.tiles else 192)},
        "vtc": {"keep_ratio": keep_ratio},
    }
    model = {"vision": vision, "language": {**language, "ffn_hidden_size": hidden * 11 // 4, "vocab_size": 1024}}
    return resolve(RunConfig.model_validate({"model": model, "data": {"mode": "caption"}, "stages": [stage]}))


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One case a keep ratio."""
    dense = resolved_run(args, 1.0)
    place, gate = groups.initialize(dense.config.parallel, seed=1), SkipGate()
    stage = build_stage(dense, dense.stages[0], place, build_model(dense, gate), gate)
    batches = {ratio: batches_of(resolved_run(args, ratio)) for ratio in KEEP_RATIOS}
    saved = {ratio: saved_bytes(stage, batches[ratio]) for ratio in KEEP_RATIOS}
    for ratio in KEEP_RATIOS:
        step_seconds(stage, batches[ratio])
    cases = []
    for ratio in KEEP_RATIOS:
        pairs = [
            (step_seconds(stage, batches[1.0]), step_seconds(stage, batches[ratio])) for _ in range(args.num_pairs)
        ]
        ideal = 1 - flops(stage, batches[ratio]) / flops(stage, batches[1.0])
        realised = statistics.median(1 - compressed / whole for whole, compressed in pairs)
        cases.append(
            {
                "keep_ratio": ratio,
                "ideal_saving": ideal,
                "realised_saving": realised,
                "efficiency": realised / ideal if ideal else None,
                "step_ratio": 1 - realised,
                "saved_bytes": saved[ratio],
                "saved_bytes_saving": 1 - saved[ratio] / saved[1.0],
            }
        )
    stage.close()
    return cases


def batches_of(resolved: Resolved) -> list[Batch]:
    """The first step's micro-batches."""
    return Feed(resolved, resolved.stages[0], groups.place()).step(0).batches


def saved_bytes(stage: Stage, batches: list[Batch]) -> int:
    """What one micro-batch saves."""
    [chunk] = stage.chunks
    saved = SavedBytes(list(chunk.parameters()))
    with saved:
        chunk(batches[0].to(current_device().torch_device), batches[0].labels)
    return saved.total


def flops(stage: Stage, batches: list[Batch]) -> int:
    """Executed in one step."""
    load = sum((batch.load for batch in batches), TokenLoad())
    return step_flops(stage.resolved, stage.spec, load, layers_executed=stage.num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tiles", action="store_true", help="fine-tune on an overview and four tiles a picture")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument(
        "--sequence-length", type=int, help="tokens a sample, visual ones included (default: 192, with tiles 800)"
    )
    parser.add_argument("--num-pairs", type=int, default=12, help="of dense and compressed steps a keep ratio")
    args = parser.parse_args()
    with process_group(600.0):
        found = {"device": current_device().name, "cases": bench(args)}
    print(json.dumps(found)) if args.json else print_table(found)


def print_table(found: dict[str, Any]) -> None:
    names = ("keep", "ideal saving", "realised", "efficiency", "step / dense", "saved MB", "bytes saving")
    table = Table(*names, title=found["device"])
    for case in found["cases"]:
        efficiency = "-" if case["efficiency"] is None else f"{case['efficiency']:.3f}"
        numbers = (
            f"{case['ideal_saving']:.3f}",
            f"{case['realised_saving']:.3f}",
            efficiency,
            f"{case['step_ratio']:.3f}",
        )
        memory = (f"{case['saved_bytes'] / 1e6:.1f}", f"{case['saved_bytes_saving']:.3f}")
        table.add_row(f"{case['keep_ratio']:g}", *numbers, *memory)
    Console().print(table)


if __name__ == "__main__":
    main()
