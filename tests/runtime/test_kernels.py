"""What a run computes with when its config asks for more than ``auto``."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.runtime.kernels import APEX_ADAM, APEX_FUSION, ENGINE, choose_kernels

ALL = {"cuda", ENGINE, "apex", APEX_ADAM, APEX_FUSION, "torchao"}


def choose(usable: set[str], fp8: Any = "off", params: Any = "bf16", **wanted: Any) -> Any:
    precision = PrecisionConfig(params=params, fp8=fp8)
    return choose_kernels(KernelsConfig.model_validate(wanted), precision, usable, ("tensorwise",))


def test_overrides() -> None:
    chosen = choose(ALL, layers="torch", optimizer="apex", gradient_accumulation_fusion=False)
    assert (chosen.linear, chosen.norm, chosen.attention) == ("torch", "torch", "torch")
    assert (chosen.optimizer, chosen.gradient_accumulation_fusion) == ("apex", "off")
    assert choose(ALL, optimizer="torch").optimizer == "torch"
    assert choose({"cuda", APEX_FUSION}, gradient_accumulation_fusion=True).gradient_accumulation_fusion == "apex"


def test_emulation_takes_torch_layers_without_fusion() -> None:
    chosen = choose(ALL, fp8="emulate")
    assert (chosen.linear, chosen.gradient_accumulation_fusion, chosen.optimizer) == ("torch", "off", ENGINE)


def test_the_loss_is_fused_only_for_bf16() -> None:
    assert choose(ALL, params="bf16").cross_entropy == "megatron-core, fused"
    assert choose(ALL, params="fp32").cross_entropy == "megatron-core"


@pytest.mark.parametrize(
    ("usable", "wanted", "message"),
    [
        (
            ALL - {"cuda"},
            {"layers": ENGINE},
            "kernels.layers=transformer-engine: Transformer Engine is not usable here",
        ),
        (ALL - {ENGINE}, {"layers": ENGINE}, "kernels.layers=transformer-engine"),
        (ALL - {"cuda"}, {"optimizer": ENGINE}, "kernels.optimizer=transformer-engine: not usable here"),
        (ALL - {APEX_ADAM}, {"optimizer": "apex"}, "kernels.optimizer=apex: not usable here"),
        (ALL - {APEX_FUSION}, {"gradient_accumulation_fusion": True}, "kernels.gradient_accumulation_fusion=true: it"),
    ],
)
def test_what_is_not_there_is_refused(usable: set[str], wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose(usable, **wanted)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
