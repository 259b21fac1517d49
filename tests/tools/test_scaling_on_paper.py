"""Scaling on paper: its made-up plans are those of real ranks, and the table says what was measured and what was not."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
TENSOR, PIPELINE = 2, 2
CONFIG: dict[str, Any] = {
    "model": {
        "vision": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        "language": {
            "num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128, "vocab_size": 256,
        },
    },
    "parallel": {
        "tensor_model_parallel_size": TENSOR, "pipeline_model_parallel_size": PIPELINE, "virtual_pipeline_model_parallel_size": 4,
        "data_parallel_size": 2, "use_distributed_optimizer": True, "overlap_p2p_comm": True, "sequence_parallel": True,
    },
    "precision": {"params": "bf16"},
    "stages": [
        {
            "name": "finetune",
            "freeze": ["vision"],
            "data": {"source": "scenes", "mode": "questions", "num_samples": 4096},
            "epochs": 1,
            "optimizer": {"lr": 1e-3},
            "batch": {"global_batch_size": 8, "micro_batch_size": 1, "sequence_length": 64},
            "lds": {"sampler": "rounds"},
        }
    ],
}  # fmt: skip


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "README.md").write_text("before\n<!-- scaling -->\nold\n<!-- /scaling -->\nafter\n")
    return tmp_path


def test_tiny_worlds(example: Path) -> None:
    command = [sys.executable, str(TOOLS / "scaling_on_paper.py"), f"--example={example}", "--worlds", "8", "16"]
    command += ["--plans-up-to=8", "--index-share=0.001", "--write", "--json"]
    run = warm.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    eight, sixteen = json.loads(run.stdout.splitlines()[-1]).values()
    # Everybody's summary of a block of 64 steps is 5 + 64 numbers of 8 bytes; the answer is one of 4.
    assert eight["masks_bytes"] == sixteen["masks_bytes"] == (5 + 64) * 8 + 4
    # A rank says its name, counts itself, waits for the word and hears it; rank 0 says two things, then asks at least twice, and tells.
    for world, numbers in ((8, eight), (16, sixteen)):
        assert 4 * (world - 1) + 5 <= numbers["num_requests"] <= 4 * (world - 1) + 100
    assert sixteen["digests_bytes"] == 2 * eight["digests_bytes"] and sixteen["num_groups"] > eight["num_groups"]
    assert "num_items" not in sixteen
    text = (example / "README.md").read_text()
    assert re.fullmatch(r"before\n<!-- scaling -->\n(\|.*\|\n)+<!-- /scaling -->\nafter\n", text)
    rows = {row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines())}
    assert rows["… parts of tensors in all plans"] == [f"{eight['num_items']:,}", f"≈ {2 * eight['num_items']:,}"]
    assert rows["data index of 665,298 samples, a rank that reads"][0].startswith("≈")


def test_made_up_plans_are_those_of_real_ranks(example: Path) -> None:
    run = warm.run([sys.executable, __file__, str(example)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "the same plans" in run.stdout


def compare_plans(example: Path) -> None:
    """Of every rank of a small world, beside what megatron-core's planner makes of the state that this rank really has."""
    sys.path.insert(0, str(TOOLS))
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from scaling import plans
    from scaling_on_paper import of_world

    from megatron_sts.dry.run import without_kernels
    from megatron_sts.mcore import checkpoint

    resolved = without_kernels(of_world(example, 12))
    spec, made_up = resolved.stage("finetune"), plans.plans_of_all(resolved, "finetune")
    assert len(made_up) == 12
    for rank, blob in enumerate(made_up):
        with plans.stage_of(resolved, spec, rank) as stage:
            state = checkpoint._sharded_state(stage.chunks, stage.optimizer, is_loading=False)
            real = plans._items(save_preprocess(state, validate_access_integrity=False)[0])
        objects = {item.index for item in plans._objects(rank, 12)}
        items = [item for item in pickle.loads(blob).items if item.index not in objects]
        assert {item.index: item for item in items} == {item.index: item for item in real}, rank
    print("the same plans")


def test_the_70b_readme_has_the_table() -> None:
    text = (ROOT / "examples/llava_llama3_70b/README.md").read_text()
    [table] = re.findall(r"<!-- scaling -->\n(.*?)<!-- /scaling -->", text, re.S)
    head, _, *rows = table.splitlines()
    assert head == "|  | 8 ranks | 64 ranks | 512 ranks | 4,096 ranks | 16,384 ranks |"
    assert len(rows) >= 20 and all(row.count("|") == head.count("|") for row in rows)
    assert "python tools/scaling_on_paper.py" in text


if __name__ == "__main__":
    compare_plans(Path(sys.argv[1]))
