"""Which stored tensor each parameter of a native model comes from, by names alone, without reading any.

It needs no torch: `stoker check` looks at a folder this way, and so does loading, before it takes memory.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec
from stoker.errors import Problem
from stoker.models.folder import WeightIndex

PACKED = ".quant_state.bitsandbytes__nf4"
"""Ends the name of what describes a weight that bitsandbytes packed in NF4."""
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", PACKED)
"""Ends of the names of what belongs to such a weight."""
# Old checkpoints hold what follows from config.json: rotary frequencies, and causal masks.
_FOLLOWS = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_MAX_PROBLEMS = 12


@dataclass(frozen=True)
class Found:
    """`sources`: the tensors to read for each parameter, by our name of it; those in `transposed` are stored [in, out],
    those in `interleaved` with gate's and up's rows in turn. `problems`: (tensor name, what is wrong)."""

    sources: Mapping[str, tuple[str, ...]]
    transposed: Set[str]
    interleaved: Set[str]
    problems: Sequence[tuple[str, str]]


def of_folder(index: WeightIndex) -> tuple[set[str], set[str]]:
    """Returns (names of the tensors that are weights, those of them that are packed in NF4)."""
    packed = {name.removesuffix(PACKED) for name in index.files if name.endswith(PACKED)}
    parts = {f"{name}{part}" for name in packed for part in PARTS}
    return {name for name in index.files if not name.endswith(_FOLLOWS)} - parts, packed


def find(
    spec: ArchSpec, present: Set[str], *, alias_of: Callable[[str, str], str] = lambda embedding, alias: alias
) -> Found:
    """Returns where the weights of `spec` lie among the tensors `present`.

    `alias_of`: from the names of a tied matrix's two tensors to the one to read.
    """
    entries = weight_map(spec)
    present = {name for name in present if not name.startswith(spec.unused)}
    prefix = _missing_prefix([name for entry in entries for name in entry.theirs], present)
    sources: dict[str, tuple[str, ...]] = {}
    read: set[str] = set()
    transposed: set[str] = set()
    interleaved: set[str] = set()
    for entry in entries:
        names = tuple(name.removeprefix(prefix) for name in entry.theirs)
        if present >= set(entry.stored):
            names = entry.stored or names
        for alias in (name.removeprefix(prefix) for name in entry.aliases):
            if alias in present:
                names = (alias_of(names[0], alias),)
                read.add(alias)
        sources[entry.ours] = names
        read |= set(names)
        if entry.transposed:
            transposed |= set(names)
        if entry.interleaved:
            interleaved |= set(names)
    problems = [(name, "is missing") for name in sorted(read - present)]
    problems += [(name, "is not part of this architecture") for name in sorted(present - read)]
    return Found(sources, transposed, interleaved, problems)


def _missing_prefix(expected: Sequence[str], present: Set[str]) -> str:
    """The first component that all but the head's names share ("transformer."), where a folder leaves it out.

    Folders written from a bare model, without its head, do; Transformers reads them too.
    """
    prefix = f"{expected[0].partition('.')[0]}."
    if any(name.startswith(prefix) for name in present):
        return ""
    return prefix if expected[0].removeprefix(prefix) in present else ""


def listed(problems: Sequence[tuple[str, str]], folder: Path) -> list[Problem]:
    """Returns the problems for people: the first dozen, how many more there are, and what to do."""
    found = [Problem(f"tensor {name} {what}.", str(folder)) for name, what in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        found.append(Problem(f"{len(problems) - _MAX_PROBLEMS} tensors more are wrong.", str(folder)))
    return [
        *found,
        Problem("The weights do not fit config.json.", fix="Fetch the model again, or mend its config.json."),
    ]
