"""The dry run of a rank against the same rank run for real: four processes over gloo, counted by the same counter."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from typing import Any

import pytest

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.batch import Batch
from megatron_sts.dry.batches import PlannedBatches
from megatron_sts.dry.counter import Counter
from megatron_sts.dry.modules import ModuleNames
from megatron_sts.dry.run import run
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups, meta
from megatron_sts.mcore.module import unwrap
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from tests.dist.launch import run_ranks
from tests.dry.configs import run_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "split": {
        "parallel": {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "recompute": "full",
        },
        "language": {"tie_word_embeddings": True},
        "vtc": {"keep_ratio": 0.5},
    },
    "copies": {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "data_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "freeze": [],
        "params": "fp32",  # in bf16 torch's layer norm keeps means in bf16 on CPUs, elsewhere in fp32
        "vtc": {"keep_ratio": 0.5, "sampler": "anchored"},
        "lds": {"sampler": "fixed", "fixed_layers": [1]},
    },
}
OF_GPUS = ("rms_norm", "usable_here")
"""What a dry run takes as it is on a GPU: fused norms and loss."""
ATTENTION = "core_attention"
"""torch takes another kernel on CPUs, of which nothing is known but that it gives the same numbers."""


class OwnBatches(PlannedBatches):
    """Micro-batches that share no memory, as they would not on a GPU."""

    def step(self, step: int) -> list[Batch]:
        """Copies."""
        return [copy.deepcopy(batch) for batch in super().step(step)]


def train_and_count() -> None:
    """Two steps, the second one counted."""
    resolved = run_of(**LAYOUTS[os.environ["LAYOUT"]])
    counter = Counter(ModuleNames(), groups.name_of, "cpu")
    with process_group(60.0), counter.counting():
        place = groups.initialize(resolved.config.parallel, resolved.config.seed)
        gate, spec = SkipGate(), resolved.stages[0]
        chunks = build_model(resolved, gate)
        for chunk in map(unwrap, chunks):
            counter.modules.add(chunk)
        stage = build_stage(resolved, spec, place, chunks, gate, OwnBatches(resolved, spec, place))
        counter.ledger.persist(tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers()))
        for step in range(2):
            stage.mask(step)
            counter.begin()
            train_step(stage, step)
        counter.ledger.end()
        facts = {
            "work": {name: asdict(work) for name, work in counter.work.items()},
            "traffic": [asdict(one) for one in counter.traffic],
            "saved": counter.ledger.peak_by_module,
        }
    print("COUNTED", json.dumps(facts), flush=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[Resolved, list[dict[str, Any]]]:
    """A run, and what each of its ranks did."""
    outputs = run_ranks(train_and_count, 4, timeout_s=120, LAYOUT=request.param)
    lines = (line for output in outputs for line in output.splitlines() if line.startswith("COUNTED"))
    return run_of(**LAYOUTS[request.param]), [json.loads(line.removeprefix("COUNTED ")) for line in lines]


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_does_what_it_does_for_real(layout: Any, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = meta._stand_ins
    monkeypatch.setattr(meta, "_stand_ins", lambda: (each for each in stand_ins() if each[1] not in OF_GPUS))
    resolved, counted = layout
    account, real = run(resolved, rank, step=1), counted[rank]
    dry = {name: asdict(work) for name, work in account.work.items()}
    assert without_attention(dry) == without_attention(real["work"])
    assert [asdict(one) for one in account.traffic] == real["traffic"]
    assert without_attention(account.memory.activations_by_module) == without_attention(real["saved"])


def without_attention(by_module: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in by_module.items() if ATTENTION not in name}
