"""What a model's architecture allows, whatever the hardware."""

from typing import Any

from stoker.arch import arithmetic
from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.arch.spec import AttentionSpec, DynamicScaling, LatentAttentionSpec, LinearScaling
from stoker.config.document import Path
from stoker.config.schema import RunConfig
from stoker.errors import Problem
from stoker.plan.adapter import experts_problem, targets_problem


def max_sequence_length(spec: AnySpec) -> int:
    """Returns the longest sequence, in tokens, that the model's positions were made for.

    Linear and dynamic scaling stretch `max_position_embeddings` by their factor; with the other scalings it is the
    stretched length itself.
    """
    if isinstance(spec, BorrowedSpec):
        return spec.max_positions
    lengths = [spec.learned_positions - spec.position_offset] if spec.learned_positions else []
    for rope in arithmetic.ropes(spec):
        scaling = rope.scaling
        stretch = scaling.factor if isinstance(scaling, LinearScaling | DynamicScaling) else 1.0
        lengths.append(int(spec.max_positions * stretch))
    return min(lengths, default=spec.max_positions)


def fitted(config: RunConfig, spec: AnySpec) -> RunConfig:
    """Returns the configuration with what the model decides of data.sequence_length and packing, unless they are set.

    Sequences are no longer than the model can take. Rows are not packed where its class cannot keep documents apart:
    each would run by itself all the same.
    """
    changes: dict[str, Any] = {}
    if "sequence_length" not in config.data.model_fields_set:
        changes["sequence_length"] = min(config.data.sequence_length, max_sequence_length(spec))
    if "packing" not in config.data.model_fields_set and isinstance(spec, BorrowedSpec) and not spec.packs:
        changes["packing"] = False
    # Not counted as set by the user, so that fitting it again gives the same.
    data = type(config.data).model_construct(config.data.model_fields_set, **{**dict(config.data), **changes})
    return config.model_copy(update={"data": data})


def left_out_notice(spec: AnySpec) -> str:
    """Returns the sentence that says what the model's own training had and this one has not, or ""."""
    if isinstance(spec, BorrowedSpec) or not spec.left_out:
        return ""
    return f"config.json has {', '.join(spec.left_out)}, which training leaves out."


def problems(config: RunConfig, spec: AnySpec) -> list[tuple[Path, Problem]]:
    """Returns what this model cannot do of what the configuration asks, each with the path of the setting."""
    found: list[tuple[Path, Problem | None]] = [
        (("data", "sequence_length"), _length_problem(fitted(config, spec), spec))
    ]
    if config.adapter is not None:
        found.append((("adapter", "targets"), targets_problem(spec, config.adapter.targets)))
        found.append((("adapter",), experts_problem(spec, config.adapter)))
    found.append((("engine", "context_parallel"), _context_problem(config.engine.context_parallel, spec)))
    return [(path, problem) for path, problem in found if problem is not None]


def _context_problem(size: int, spec: AnySpec) -> Problem | None:
    """What keeps processes from sharing rows of this model."""
    what = f"engine.context_parallel = {size}"
    if size == 1:
        return None
    if isinstance(spec, BorrowedSpec):
        return Problem(f"{what}: rows are shared by native models only, and this one runs through {spec.origin}.")
    for layer in spec.layers:
        if layer.mixer is None:
            continue
        if not isinstance(layer.mixer, AttentionSpec | LatentAttentionSpec):
            return Problem(
                f"{what}: {spec.model_type} has layers that hand a state on from position to position, and rows that "
                "processes share would break it.",
                fix="Leave it out for this model.",
            )
        if layer.mixer.num_heads % size:
            return Problem(
                f"{what} does not divide the {layer.mixer.num_heads} attention heads of {spec.model_type}.",
                fix="Use a divisor of it.",
            )
    return None


def _length_problem(config: RunConfig, spec: AnySpec) -> Problem | None:
    asked, allowed = config.data.sequence_length, max_sequence_length(spec)
    if asked <= allowed:
        return None
    return Problem(
        f"data.sequence_length = {asked}: {config.model.base} was made for sequences of at most {allowed} tokens.",
        fix=f"Set it to {allowed} or less, or choose a model with a longer context.",
    )
