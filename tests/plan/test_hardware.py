"""Presets, a user's own file, and what is wrong with one."""

from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.plan.hardware import PRESETS, load_hardware, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_promise_less_than_their_data_sheets(name: str) -> None:
    device = load_hardware(name).device
    assert device.sustained_tflops.bf16 < device.peak_tflops.bf16
    assert (device.sustained_tflops.fp8 is None) == (device.peak_tflops.fp8 is None)
    assert device.attention.forward_tflops < device.peak_tflops.bf16


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((PRESETS / "h100.yaml").read_text().replace("gpus_per_node: 8", "gpus_per_node: 4"))
    assert load_hardware(str(path)) == load_hardware("h100").model_copy(update={"gpus_per_node": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gpus_per_node: 8", "gpus_per_node: 0"), "gpus_per_node=0"),
        (("gpus_per_node: 8", "gpus_a_node: 8"), "mine.yaml: gpus_a_node=8: unknown key; did you mean gpus_per_node?"),
        (("memory_gib: 79.1", "memory_gib: much"), "mine.yaml: device.memory_gib=much: it should be a number; "),
        (("  memory_gib: 79.1\n", ""), "mine.yaml: device.memory_gib: missing; add it"),
        (("name:", "- name:"), "is no YAML"),
        (("gpus_per_node: 8", "gpus_per_node: [8"), "is no YAML"),
    ],
)
def test_a_wrong_file_is_named_in_a_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((PRESETS / "h100.yaml").read_text().replace(*change))
    with pytest.raises(ConfigError, match="--hardware=") as error:
        load_hardware(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
    path.write_text("[8, gpus]")
    with pytest.raises(ConfigError, match=r"mine.yaml: holds no keys; copy .*h100.yaml"):
        load_hardware(str(path))


def test_neither_preset_nor_file() -> None:
    with pytest.raises(ConfigError, match="use a100, h100, h200 or a path"):
        load_hardware("h1000")
