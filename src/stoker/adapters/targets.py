"""Which linear layers get an adapter: the whole of them, names, or a regular expression, with PEFT's meaning."""

import difflib
import re
from collections.abc import Sequence, Set

from stoker.errors import ModelError

ALL_LINEAR = "all-linear"
ALL_DENSE = "all-dense"


def select(
    names: Sequence[str],
    targets: str | Sequence[str],
    *,
    by_name_only: Set[str] = frozenset(),
    experts: Set[str] = frozenset(),
) -> frozenset[str]:
    """Returns those of `names` (whole Hugging Face module names) that `targets` means.

    "all-linear" means all but those in `by_name_only`, "all-dense" all but those and `experts`; a list matches whole
    names or their last dotted components; any other string is a regular expression that must match a whole name.
    Raises ModelError for an entry that matches nothing, and for a regular expression that is none.
    """
    if isinstance(targets, str):
        all_of = {ALL_LINEAR: by_name_only, ALL_DENSE: by_name_only | experts}
        chosen = frozenset(names) - all_of[targets] if targets in all_of else _matching(names, targets)
    else:
        chosen = frozenset(name for name in names for target in targets if _ends_with(name, target))
        unknown = [target for target in targets if not any(_ends_with(name, target) for name in names)]
        if unknown:
            raise ModelError(f"no linear layer is called {_listed(unknown)}.", fix=_what_there_is(names, unknown))
    if not chosen:
        raise ModelError(f"the targets {targets!r} match no linear layer.", fix=_what_there_is(names, ()))
    return chosen


def short(name: str) -> str:
    """Returns the last component of a module name: "q_proj" for "model.layers.0.self_attn.q_proj"."""
    return name.rsplit(".", 1)[-1]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matching(names: Sequence[str], pattern: str) -> frozenset[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{pattern!r} is no regular expression: {error}.", fix="Mend it, or list names.") from error
    return frozenset(name for name in names if expression.fullmatch(name))


def _what_there_is(names: Sequence[str], unknown: Sequence[str]) -> str:
    last = list(dict.fromkeys(map(short, names)))
    near = dict.fromkeys(match for target in unknown for match in difflib.get_close_matches(short(target), last, n=1))
    meant = f"Did you mean {_listed(list(near))}? " if near else ""
    example = f" (whole names look like {names[0]})" if names else ""
    return f"{meant}There are {_listed(last) or 'none'}{example}; or use {ALL_LINEAR!r}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
