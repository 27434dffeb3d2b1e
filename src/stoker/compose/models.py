"""Which path a model takes, and why, in words."""

from typing import NamedTuple

from stoker.arch import arithmetic
from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.arch.shape import why_not_llama
from stoker.arch.support import Support, row_of
from stoker.compose.model import open_base
from stoker.plan.limits import max_sequence_length

# A context that no configuration means: the model has no limit of its own.
_NO_LIMIT = 1 << 20


class Fact(NamedTuple):
    """A heading and what is to be said."""

    name: str
    text: str


def describe(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[list[Fact], Support | None]:
    """Returns what is known of the model `name`, a folder, Hub id or builtin, and its row of the support table.

    The row is None for a model type that was not tried out: what its class can do is found out when it is loaded.

    Raises:
        ModelError: there is no such model, or neither path can take it; the message has the reason.
    """
    spec = open_base(name, revision=revision, trust_remote_code=trust_remote_code).spec
    facts = _borrowed(spec) if isinstance(spec, BorrowedSpec) else _native(spec)
    limit = max_sequence_length(spec)
    facts += [
        Fact("size", f"{arithmetic.num_parameters(spec):,} parameters, {len(spec.layers)} layers"),
        Fact("context", "no limit of its own" if limit >= _NO_LIMIT else f"{limit:,} tokens"),
    ]
    row = row_of(spec.model_type)
    is_same = row is not None and (row.path == "borrowed") == isinstance(spec, BorrowedSpec)
    if isinstance(spec, BorrowedSpec) and not is_same:
        facts.append(Fact("tried", "not with this version: what its class bears is found out and said on loading"))
    return facts, row if is_same else None


def _native(spec: AnySpec) -> list[Fact]:
    reasons = [reason for layer in spec.layers if (reason := why_not_llama(layer))]
    layers = "each can be one operation"
    if reasons:
        count = "all" if len(reasons) == len(spec.layers) else f"{len(reasons)} of {len(spec.layers)}"
        layers = f"{count} run op by op: they have {reasons[0]}"
    return [Fact("path", f"native: family {spec.family}, model_type {spec.model_type}"), Fact("kernel", layers)]


def _borrowed(spec: BorrowedSpec) -> list[Fact]:
    packing = "at once, if its class bears it (checked on loading)" if spec.packs else "not packed"
    return [
        Fact("path", f"borrowed: through {spec.origin}"),
        Fact("why", spec.why),
        Fact("adapters", f"on {', '.join(_adapted(spec))}"),
        Fact("rows", packing),
    ]


def _adapted(spec: BorrowedSpec) -> list[str]:
    """The last names of the linear layers that an adapter can be on."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in arithmetic.linear_shapes(spec)))
