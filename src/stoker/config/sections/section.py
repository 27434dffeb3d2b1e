"""What the sections of a run's YAML are made of: their base class, bounded values, choice by `kind`."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

DEFAULT_KINDS = ("sft", "cosine", "adamw")
"""The kinds of task, schedule and optimiser that a section means when it does not name its kind."""

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the YAML: unknown keys refused, types never converted, values never changed after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def by_kind(default: str) -> Discriminator:
    """Returns a discriminator on `kind`, which may be left out for the default kind."""

    def kind(value: Any) -> str:
        return str(value.get("kind", default)) if isinstance(value, dict) else getattr(value, "kind", str(value))

    return Discriminator(kind)


def unless_set(values: Any, **defaults: Any) -> Any:
    """Returns the section with each default added whose key, and whose alternative in steps, are both left out."""
    if not isinstance(values, dict):
        return values
    steps = {name: name.replace("epochs", "steps") for name in defaults}
    missing = {
        name: defaults[name] for name in defaults if values.get(name) is None and values.get(steps[name]) is None
    }
    return values | missing
