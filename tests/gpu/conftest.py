"""Tests in this folder need a CUDA device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before CUDA's libraries start: fp32 means fp32 here. By default the vision tower's convolution and Transformer Engine's
# products round fp32 operands to TF32's 11 bits.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)
