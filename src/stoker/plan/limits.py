"""What a model's architecture allows, whatever the hardware."""

from stoker.arch import arithmetic
from stoker.arch.spec import ArchSpec, DynamicScaling, LinearScaling
from stoker.config.document import Path
from stoker.config.schema import RunConfig
from stoker.errors import Problem
from stoker.plan.adapter import targets_problem


def max_sequence_length(spec: ArchSpec) -> int:
    """Returns the longest sequence, in tokens, that the model's positions were made for.

    Linear and dynamic scaling stretch `max_position_embeddings` by their factor; with the other scalings it is the
    stretched length itself.
    """
    lengths = [spec.learned_positions - spec.position_offset] if spec.learned_positions else []
    for rope in arithmetic.ropes(spec):
        scaling = rope.scaling
        stretch = scaling.factor if isinstance(scaling, LinearScaling | DynamicScaling) else 1.0
        lengths.append(int(spec.max_positions * stretch))
    return min(lengths, default=spec.max_positions)


def fitted(config: RunConfig, spec: ArchSpec) -> RunConfig:
    """Returns the configuration with a data.sequence_length that the model can take, unless the user set one."""
    if "sequence_length" in config.data.model_fields_set:
        return config
    length = min(config.data.sequence_length, max_sequence_length(spec))
    # Not counted as set by the user, so that fitting it again gives the same.
    data = type(config.data).model_construct(
        config.data.model_fields_set, **{**dict(config.data), "sequence_length": length}
    )
    return config.model_copy(update={"data": data})


def problems(config: RunConfig, spec: ArchSpec) -> list[tuple[Path, Problem]]:
    """Returns what this model cannot do of what the configuration asks, each with the path of the setting."""
    found: list[tuple[Path, Problem | None]] = [
        (("data", "sequence_length"), _length_problem(fitted(config, spec), spec))
    ]
    if config.adapter is not None:
        found.append((("adapter", "targets"), targets_problem(spec, config.adapter.targets)))
    return [(path, problem) for path, problem in found if problem is not None]


def _length_problem(config: RunConfig, spec: ArchSpec) -> Problem | None:
    asked, allowed = config.data.sequence_length, max_sequence_length(spec)
    if asked <= allowed:
        return None
    return Problem(
        f"data.sequence_length = {asked}: {config.model.base} was made for sequences of at most {allowed} tokens.",
        fix=f"Set it to {allowed} or less, or choose a model with a longer context.",
    )
