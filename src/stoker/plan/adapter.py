"""Which layers an adapter's targets mean in an architecture, and how many parameters it adds there."""

import difflib
import re

from stoker.arch.borrowed import AnySpec
from stoker.arch.families import mixtures, state_space
from stoker.arch.saved import Adapted
from stoker.arch.spec import ExpertsSpec
from stoker.config.schema import Adapter
from stoker.errors import Problem
from stoker.plan import facts
from stoker.plan.remember import remember

_ALL, _DENSE = "all-linear", "all-dense"


def targeted(spec: AnySpec, targets: str | list[str]) -> list[str]:
    """Returns the full Hugging Face names of the linear layers that `targets` means, as PEFT reads them."""
    return list(_targeted(spec, targets if isinstance(targets, str) else tuple(targets)))


@remember(0)
def _targeted(spec: AnySpec, targets: str | tuple[str, ...]) -> list[str]:
    names = list(facts.linear_shapes(spec))
    if isinstance(targets, tuple):
        return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
    if targets not in (_ALL, _DENSE):
        return [name for name in names if re.fullmatch(targets, name)]
    left_out = set(facts.linears_by_name_only(spec))
    if targets == _DENSE:
        left_out |= set(facts.expert_counts(spec))
    return [name for name in names if name not in left_out]


def num_targeted(spec: AnySpec, targets: str | list[str]) -> int:
    """Returns how many linear layers `targets` means."""
    return len(_targeted(spec, targets if isinstance(targets, str) else tuple(targets)))


def targets_problem(spec: AnySpec, targets: str | list[str]) -> Problem | None:
    """Returns what is wrong with `adapter.targets` for this model, or None."""
    names = list(facts.linear_shapes(spec))
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if isinstance(targets, str):
        if targeted(spec, targets):
            return None
        fix = f"It must match whole names such as {names[0]}; or use a list of {', '.join(last)}."
        return Problem(f"adapter.targets = {targets!r} matches no layer of this model.", fix=fix)
    unknown = [target for target in targets if not targeted(spec, [target])]
    if not unknown:
        return None
    close = difflib.get_close_matches(unknown[0], last, 1, 0.6)
    fix = f"{f'Did you mean {close[0]}? ' if close else ''}There are {', '.join(last)}."
    return Problem(f"adapter.targets: this model has no layer called {', '.join(unknown)}.", fix=fix)


def loading_notice(spec: AnySpec, targets: str | list[str]) -> str:
    """Returns the sentence that says what PEFT will not load of the adapter, or ""."""
    adapted = targeted(spec, targets)
    refused = sorted(set(adapted) & facts.linears_by_name_only(spec))
    if refused and not state_space.peft_loads_out_proj(spec.model_type):
        return (
            f"PEFT loads no adapter on {refused[0]} and its like ({len(refused)} layers) of a {spec.model_type} model. "
            "Stoker does; to use this one elsewhere, merge it into its base (stoker merge)."
        )
    mistaken = mixtures.peft_mistakes_for_experts(spec.model_type, adapted, facts.expert_counts(spec))
    if mistaken:
        return (
            f"PEFT does not load this adapter: in a {spec.model_type} model it takes targets in dense layers or shared "
            f"experts ({mistaken[0]} and {len(mistaken) - 1} more) for those of experts in old checkpoints. Stoker "
            "does; to use it elsewhere, merge it into its base (stoker merge), or leave them out: targets: "
            f"[{', '.join(_without(adapted, mistaken))}]."
        )
    return ""


def _without(adapted: list[str], mistaken: list[str]) -> list[str]:
    """Returns the shortest names of what is adapted but for those that PEFT mistakes."""
    left_out = {name.rpartition(".")[2] for name in mistaken}
    kept = [name for name in adapted if name not in mistaken]
    short = {name: name.rpartition(".")[2] for name in kept}
    return list(
        dict.fromkeys(".".join(name.split(".")[-2:]) if last in left_out else last for name, last in short.items())
    )


def experts_problem(spec: AnySpec, adapter: Adapter) -> Problem | None:
    """Returns why experts cannot have this adapter, or None: in PEFT it has neither dropout nor DoRA there."""
    experts = facts.expert_counts(spec).keys() & set(targeted(spec, adapter.targets))
    if not experts or (adapter.kind != "dora" and adapter.dropout == 0.0):
        return None
    what = "no DoRA" if adapter.kind == "dora" else f"no dropout, and adapter.dropout is {adapter.dropout}"
    name = sorted(experts)[0].rpartition(".")[2]
    return Problem(
        f"an adapter on experts ({name} of this mixture) has {what}.",
        fix="Use kind: lora and dropout: 0.0, or name targets outside of the experts.",
    )


@remember(0, 1)
def adapted(spec: AnySpec, adapter: Adapter, quantization: str) -> Adapted:
    """Returns what the adapter's layers keep for their backward, over a base in this format."""
    names = tuple(targeted(spec, adapter.targets))
    return Adapted(
        facts.adapted_linears(spec, adapter.rank, names),
        adapter.kind == "dora",
        adapter.dropout > 0.0 and quantization != "none",
        facts.adapter_parameters_by_linear(spec, adapter.rank, names),
    )


def adapter_parameters(spec: AnySpec, adapter: Adapter) -> int:
    """Returns how many parameters the adapter trains: two matrices a layer, and DoRA's magnitude of each output row."""
    names = targeted(spec, adapter.targets)
    count = facts.lora_parameters(spec, adapter.rank, tuple(names))
    shapes = facts.linear_shapes(spec)
    return count + (sum(shapes[name][1] for name in names) if adapter.kind == "dora" else 0)


def expert_parameters(spec: AnySpec, adapter: Adapter | None) -> tuple[int, int]:
    """Returns how many values experts train, of their adapters or (None) of their weights: in all, and in a layer."""
    experts, shapes = facts.expert_counts(spec), facts.linear_shapes(spec)
    chosen = experts.keys() if adapter is None else experts.keys() & set(targeted(spec, adapter.targets))
    if not chosen:
        return 0, 0
    each = [(experts[name], *shapes[name]) for name in chosen]
    total = sum(n * (into * out if adapter is None else adapter.rank * (into + out)) for n, into, out in each)
    return total, total // sum(isinstance(layer.feed_forward, ExpertsSpec) for layer in spec.layers)
