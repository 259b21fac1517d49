"""These tests pretend a GPU for their whole process: only tests/te/run.sh runs them, in an environment of its own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("MEGATRON_STS_TE_JOB") else ["test_*.py"]
# Ranks that a test starts inherit these. Scales follow from the table in torch instead of in one CUDA kernel, and eagerly.
os.environ |= {"NVTE_UNFUSED_FP8_UPDATE": "1", "NVTE_TORCH_COMPILE": "0"} if not collect_ignore_glob else {}
