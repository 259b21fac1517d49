"""All ranks of ``generate`` load the same checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_sts.commands.answer import same_source
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks


def on_two_ranks() -> None:
    with process_group(30):
        assert same_source(Path(f"checkpoints/{os.environ['RANK']}")) == Path("checkpoints/0")


def test_a_checkpoint_written_in_between_is_loaded_by_no_rank() -> None:
    run_ranks(on_two_ranks, 2, 60)
