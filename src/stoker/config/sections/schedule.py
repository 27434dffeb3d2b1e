"""`train.schedule`: how the rate changes over a run."""

from typing import Annotated, Literal

from pydantic import Tag

from stoker.config.sections.section import DEFAULT_KINDS, CountOrZero, Fraction, Ratio, Section, Share, by_kind


class _Warmup(Section):
    warmup_steps: CountOrZero | None = None
    """Steps over which the rate rises from 0. Set this or `warmup_ratio`, not both."""
    warmup_ratio: Ratio | None = None
    """The same as a share of all steps."""


class Constant(_Warmup):
    """The rate stays where it is."""

    kind: Literal["constant"] = "constant"
    """The schedule."""


class Linear(_Warmup):
    """The rate falls in a straight line."""

    kind: Literal["linear"] = "linear"
    """The schedule."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class Cosine(_Warmup):
    """The rate falls along half a cosine."""

    kind: Literal["cosine"] = "cosine"
    """The schedule."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class WarmupStableDecay(_Warmup):
    """The rate stays, then falls in a straight line at the end."""

    kind: Literal["wsd"] = "wsd"
    """The schedule."""
    decay_ratio: Share = 0.1
    """Share of all steps over which the rate falls."""
    floor: Fraction = 0.0
    """Share of `learning_rate` that is left at the last step."""


class InverseSqrt(_Warmup):
    """The rate falls with the square root of the step."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    """The schedule."""


Schedule = Annotated[
    Annotated[Constant, Tag("constant")]
    | Annotated[Linear, Tag("linear")]
    | Annotated[Cosine, Tag("cosine")]
    | Annotated[WarmupStableDecay, Tag("wsd")]
    | Annotated[InverseSqrt, Tag("inverse_sqrt")],
    by_kind(DEFAULT_KINDS[1]),
]
