"""Reads rotary embeddings from a `config.json`, in both forms that Transformers accepts.

Old: `rope_theta` beside `rope_scaling: {"type" or "rope_type": ..., "factor": ...}`. New (transformers 5):
`rope_parameters: {"rope_type": ..., "rope_theta": ..., "factor": ...}`. Precedence and defaults follow
`modeling_rope_utils.py` of transformers 5.24.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from stoker.arch.families.reader import ConfigReader
from stoker.arch.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    max_positions: int,
    partial: float | None = None,
    theta: float = 10_000.0,
    interleaved: bool = False,
    parameters: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The rotary embedding of every head; raises ModelError for an unknown type, key or value.

    `partial`: the share of a head's channels that turn where config.json does not say; None: the model type turns whole
    heads. `theta`: the base where it does not say. `parameters`: one of several settings that config.json has, with a
    base of its own. `aliases`: other names of types.
    """
    top = reader if parameters is None else None
    if parameters is None:
        parameters = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise reader.error(f"rope_scaling = {parameters!r} is not a mapping.")
    base = parameters.get("rope_theta", top.get("rope_theta", theta) if top else theta)
    dim = _turned(reader, parameters, head_dim, partial)
    values = _Values(reader, parameters, max_positions, dim)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _READERS:
        raise reader.error(
            f"rope type {kind!r} is not native to Stoker.",
            fix=f"Known: {', '.join(_READERS)}. Until then, Transformers with PEFT trains this model.",
        )
    keys, read_scaling = _READERS[kind]
    # Keys with the value null say nothing, so they are welcome anywhere.
    unknown = sorted(key for key in parameters if parameters[key] is not None and key not in _COMMON_KEYS | keys)
    if unknown:
        raise reader.error(f"rope type {kind!r} has no settings {', '.join(unknown)}.")
    base = reader.number_above(0.0, "rope_theta", base)
    return RopeSpec(dim=dim, theta=base, scaling=read_scaling(values), interleaved=interleaved)


def _turned(reader: ConfigReader, parameters: Mapping[str, Any], head_dim: int, partial: float | None) -> int:
    """How many channels of a head turn."""
    share = parameters.get("partial_rotary_factor")
    if partial is None:
        if share not in (None, 1, 1.0):
            raise reader.error(f"partial_rotary_factor = {share!r} is not supported.")
        return head_dim
    share = reader.get("partial_rotary_factor", partial) if share is None else share
    dim = int(head_dim * reader.number_above(0.0, "partial_rotary_factor", share))
    if dim > head_dim or dim < 2 or dim % 2:
        raise reader.error(f"partial_rotary_factor = {share!r} turns {dim} of {head_dim} channels of a head.")
    return dim


class _Values:
    """The rope's own mapping, with what the rest of the configuration lends it."""

    def __init__(self, reader: ConfigReader, parameters: Mapping[str, Any], max_positions: int, dim: int) -> None:
        self.reader = reader
        self.dim = dim
        self.parameters = parameters
        self.max_positions = max_positions

    def get(self, key: str, default: Any = None) -> Any:
        value = self.parameters.get(key)
        return default if value is None else value

    def positive(self, key: str, default: float | None = None) -> float:
        return self.reader.number_above(0.0, f"the rope's {key}", self.get(key, default))

    @property
    def original_max_positions(self) -> int:
        """A top-level value wins over the rope's own, as in Transformers; neither: the model's context."""
        own = self.get("original_max_position_embeddings", self.max_positions)
        value = self.reader.get("original_max_position_embeddings") or own
        return int(self.reader.number_above(0.0, "original_max_position_embeddings", value))


def _linear(values: _Values) -> LinearScaling:
    return LinearScaling(factor=values.positive("factor"))


def _dynamic(values: _Values) -> DynamicScaling:
    # Transformers compares with max_position_embeddings and reads no original length here.
    return DynamicScaling(factor=values.positive("factor"), original_max_positions=values.max_positions)


def _llama3(values: _Values) -> Llama3Scaling:
    low, high = values.positive("low_freq_factor"), values.positive("high_freq_factor")
    if high <= low:
        raise values.reader.error(f"the rope's high_freq_factor = {high:g} is not above low_freq_factor = {low:g}.")
    return Llama3Scaling(
        factor=values.positive("factor"),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_max_positions=values.original_max_positions,
    )


def _yarn(values: _Values) -> YarnScaling:
    original = values.original_max_positions
    factor = values.positive("factor", values.max_positions / original)
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        if values.get("mscale") and values.get("mscale_all_dim"):
            scale, scale_all = values.positive("mscale"), values.positive("mscale_all_dim")
            attention_factor = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all)
        else:
            attention_factor = _yarn_magnitude(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=values.reader.number_above(0.0, "the rope's attention_factor", attention_factor),
        beta_fast=values.positive("beta_fast", 32.0),
        beta_slow=values.positive("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    """YaRN's temperature, equation 22 of arXiv:2309.00071 with DeepSeek's `scale`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(values: _Values) -> LongRopeScaling:
    original = values.original_max_positions
    factor = values.positive("factor", values.max_positions / original)
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=_factors(values, "short_factor"),
        long_factors=_factors(values, "long_factor"),
        original_max_positions=original,
        attention_factor=values.reader.number_above(0.0, "the rope's attention_factor", attention_factor),
    )


def _factors(values: _Values, key: str) -> tuple[float, ...]:
    """A factor for each frequency."""
    factors, count = values.get(key), values.dim // 2
    if not isinstance(factors, list) or len(factors) != count:
        raise values.reader.error(f"the rope's {key} must list {count} numbers, one for each frequency.")
    return tuple(values.reader.number_above(0.0, f"the rope's {key}", factor) for factor in factors)


_READERS: dict[str, tuple[set[str], Callable[[_Values], RopeScaling | None]]] = {
    "default": (set(), lambda values: None),
    "linear": ({"factor"}, _linear),
    "dynamic": ({"factor", "original_max_position_embeddings"}, _dynamic),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, _llama3),
    "longrope": (
        {"short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"},
        _longrope,
    ),
    "yarn": (
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
        _yarn,
    ),
}
