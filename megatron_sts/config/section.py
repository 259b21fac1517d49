"""What all config sections share: the base class and the kinds of numbers. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Epsilon = Annotated[float, Field(ge=1e-30, le=1.0)]
"""Keeps a division from being one by zero: below 1e-30 it would itself be zero in fp32 before long."""
Deviation = Annotated[float, Field(gt=0.0, le=10.0)]
"""Standard deviation of initial weights: 0 would never learn, and beyond 10 the first pass overflows sooner or later."""


class Section(BaseModel):
    """Base of every config section: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, data: object) -> object:
        # YAML 1.1 reads a bare `off` as False.
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            name: "off" if value is False and name in fields and "off" in get_args(fields[name].annotation) else value
            for name, value in data.items()
        }


def section_of(annotation: Any) -> type[Section] | None:
    """The config section inside a field's type: ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)
