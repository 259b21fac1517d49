"""These tests pretend a GPU for their whole process: only tests/te/run.sh runs them, in an environment of its own."""

from __future__ import annotations

import importlib
import os

IS_JOB = "MEGATRON_STS_TE_JOB" in os.environ
collect_ignore_glob = [] if IS_JOB else ["test_*.py"]
if IS_JOB:
    # For ranks that a test starts too: scales follow from the table in torch instead of in one CUDA kernel, and eagerly.
    os.environ |= {"NVTE_UNFUSED_FP8_UPDATE": "1", "NVTE_TORCH_COMPILE": "0"}
    importlib.import_module("tests.te.no_gpu")  # before anything asks torch for a device
