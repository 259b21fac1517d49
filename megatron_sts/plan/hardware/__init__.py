"""What a cluster can do: presets beside this file (``NAME.yaml``), or a user's own file of the same form. Torch-free.

Rates are what programs reach for minutes, not what data sheets promise; each preset says where its numbers come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.explain import explain
from megatron_sts.config.precision import Fp8, PrecisionConfig
from megatron_sts.config.section import PositiveInt, Ratio, Section

PRESETS = Path(__file__).parent
Format = Literal["bf16", "fp8"]
"""What a matrix product multiplies."""
Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]


class Rates(Section):
    """TFLOP/s of each format."""

    bf16: Positive
    fp8: Positive | None = None
    """None: the device has none."""


class Attention(Section):
    """A fused attention kernel: rate(s) = plateau x s/(s + half_length), for heads of 128 channels; causal masks half counted."""

    forward_tflops: Positive
    backward_tflops: Positive
    """Of the 2.5 times as many FLOPs that the backward pass computes: it forms the scores anew."""
    half_length: NonNegative
    """Tokens at which half of the plateau is reached."""
    narrow_heads: Ratio = 0.75
    """What is left of the rate with heads of 64 channels or fewer."""


class Device(Section):
    """One GPU."""

    peak_tflops: Rates
    """Of the data sheet, dense: what MFU divides by."""
    sustained_tflops: Rates
    """Of large matrix products in a long run, at the clock that the power limit leaves."""
    fp8_recipes: tuple[Fp8, ...] | None = None
    """Of Transformer Engine, those that it can run; None: any, if it has rates of FP8."""
    attention: Attention
    flash_attention_2: Attention | None = None
    """None: as ``attention``."""
    num_multiprocessors: PositiveInt
    memory_gib: Positive
    """What one process can allocate."""
    memory_gbytes_per_s: Positive
    memory_efficiency: Ratio
    """Share of it that elementwise kernels, norms and casts reach."""
    kernel_gap_us: NonNegative
    """Between two kernels of a full queue."""
    speed_spread: Annotated[float, Field(ge=0, lt=0.2)]
    """Standard deviation of the speed of equal devices, as a share: at a power limit each chip has a clock of its own, and ranks
    that work together are as fast as the slowest."""


class Host(Section):
    """How fast a CPU core launches what a GPU computes: faster than that no rank gets through its micro-batches."""

    layer_forward_ms: NonNegative
    """One decoder layer, forward; its backward pass takes as long."""
    fp8_layer_forward_ms: NonNegative
    """The same with FP8's casts and scales."""
    ring_step_ms: NonNegative = 0.2
    """A further step of context parallelism's ring in such a layer: its calls of PyTorch, attention, a send and a receipt. An
    estimate, as the next one (``h100.yaml``)."""
    cut_product_ms: NonNegative = 0.05
    """What a product takes longer that user buffers cut up: its pieces, their sends, receipts and events."""
    tower_layer_forward_ms: NonNegative
    """One layer of a vision tower, forward."""
    step_ms: NonNegative
    """What a step takes besides: gradient norm, metrics, the optimizer's launches."""
    uncertainty: Annotated[float, Field(ge=0, lt=1)]
    """As ``Hardware.uncertainty``, of steps that are as long as launching takes."""


class Link(Section):
    """A network. A collective moves at ``gbytes_per_s`` of bus bandwidth a GPU."""

    gbytes_per_s: Positive
    """One direction, a GPU, as NCCL reaches it with large messages."""
    latency_us: NonNegative
    """Of one hop, software included."""


class Hardware(Section):
    """Equal nodes of equal GPUs."""

    name: str
    uncertainty: Annotated[float, Field(ge=0, lt=1)]
    """Relative error within which predicted seconds are meant to be: of all measured rows, each source left out while rates are
    set, or a guess where fewer sources were measured."""
    device: Device
    host: Host
    gpus_per_node: PositiveInt
    node_link: Link
    """Between GPUs of a node."""
    network: Link
    """Between nodes, of each GPU's own adapter."""


def preset_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_hardware(name_or_path: str, option: str = "--hardware") -> Hardware:
    """A preset by its name, or a file by its path. ``option``: what named it, for messages.

    Raises:
        ConfigError: no such preset or file, no YAML, or a value that is missing, unknown or out of range.
    """
    path = PRESETS / f"{name_or_path}.yaml" if name_or_path in preset_names() else Path(name_or_path)
    if not path.is_file():
        refuse(option, name_or_path, "neither a preset nor a file", f"use {', '.join(preset_names())} or a path")
    try:
        written: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse(option, path, f"is no YAML ({str(error).splitlines()[0]})", "mend the file")
    if not isinstance(written, dict):
        refuse(option, path, "holds no keys", f"copy {PRESETS}/h100.yaml and change its values")
    try:
        return Hardware.model_validate(written)
    except ValidationError as error:
        said = explain(error, written, Hardware)
        raise ConfigError(f"{option}={path}: {said}; {PRESETS}/h100.yaml has all keys") from None


def check_formats(hardware: Hardware, precision: PrecisionConfig, option: str = "--hardware") -> None:
    """Refuses FP8 that the device does not have. ``option``: what named it, for messages."""
    recipe, device = precision.engine_recipe, hardware.device
    if recipe is None:
        return
    if device.sustained_tflops.fp8 is None:
        refuse("precision.fp8", recipe, f"{hardware.name} has no FP8", f"use off, or other {option}")
    if device.fp8_recipes is not None and recipe not in device.fp8_recipes:
        others = ", ".join(device.fp8_recipes)
        refuse("precision.fp8", recipe, f"{hardware.name} cannot scale so", f"use one of {others}, or other {option}")
