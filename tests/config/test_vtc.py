"""What a VTC section may say."""

import pytest
from pydantic import ValidationError

from megatron_sts.config.schema import VtcConfig


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"sampler": "anchored", "grid_share": 0.7}, r"grid_share \+ text_share = 1\.1 > 1 .*lower either"),
        ({"grid_share": 0.5}, "grid_share=0.5: sampler=uniform reads no shares; remove it"),
        ({"sampler": "guided", "text_share": 0.0}, "text_share=0: sampler=guided reads no shares; remove it"),
        ({"sampler": "anchored", "text_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_senseless_shares_are_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VtcConfig.model_validate(written)


@pytest.mark.parametrize("sampler", ["uniform", "random", "guided", "anchored", "pooled"])
def test_what_a_resolved_config_writes_is_read_again(sampler: str) -> None:
    vtc = VtcConfig.model_validate({"sampler": sampler})
    assert VtcConfig.model_validate(vtc.model_dump()) == vtc


@pytest.mark.parametrize(("grid_share", "text_share"), [(0.0, 1.0), (1.0, 0.0), (0.58, 0.42), (0.1, 0.9), (0.0, 0.0)])
def test_shares_may_fill_all_or_nothing(grid_share: float, text_share: float) -> None:
    assert VtcConfig(sampler="anchored", grid_share=grid_share, text_share=text_share)
