"""What a Hugging Face folder's image processor does to pixels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import ConfigError, refuse

PROCESSOR = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"


def read_image_processor(folder: Path) -> dict[str, Any]:
    """Its settings as they are written; empty if the folder has none.

    transformers 5 writes them into the processor's file, where there is one.

    Raises:
        ConfigError: the file is no JSON object.
    """
    for name, key in ((PROCESSOR, "image_processor"), (IMAGE_PROCESSOR, None)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            found = written if key is None else written.get(key)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: damaged ({error}); fetch it again") from None
        if found and isinstance(found, dict):
            return found
        if found is not None or key is None:
            raise ConfigError(f"{path}: damaged (no image processor's settings); fetch it again")
    return {}


def channels(folder: Path) -> dict[str, Any]:
    """``pixel_mean`` and ``pixel_std`` for pixels in [0, 1]; empty if the folder does not say.

    Raises:
        ConfigError: its processor computes something else with pixels.
    """
    written = read_image_processor(folder)
    factor = written.get("rescale_factor", 1 / 255) if written.get("do_rescale", True) else 1.0
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        refuse(
            f"{folder}: rescale_factor", factor, "pixels are divided by 255 here", "such a model cannot be converted"
        )
    if not written.get("do_normalize", True):
        return {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
    found: dict[str, Any] = {}
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if (values := written.get(theirs)) is not None:
            if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
                refuse(f"{folder}: {theirs}", values, "three numbers are needed, one a channel", "correct it")
            found[ours] = tuple(map(float, values))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
