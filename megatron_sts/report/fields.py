"""The fields of a step's line in metrics.jsonl that are measured, and so differ between runs that train alike."""

from __future__ import annotations

RATES = (
    "tokens_per_s",
    "text_tokens_per_s",
    "visual_tokens_per_s",
    "images_per_s",
    "tokens_per_s_per_device",
    "tflops_per_device",
    "dense_tflops_per_device",
    "mfu",
    "dense_mfu",
)
PARTS = (
    "data_s",
    "forward_s",
    "backward_s",
    "layer_communication_s",
    "pipeline_wait_s",
    "communication_s",
    "optimizer_s",
    "other_s",
)
"""Together they are a step. ``ranks`` events have them too."""
BETWEEN = "checkpoint_s"
"""Training stood still for checkpoints since the last line."""
SECONDS = ("step_time_s", "data_wait_s", *PARTS, BETWEEN)
MEASURED = frozenset((*RATES, *SECONDS, "peak_memory_bytes"))
