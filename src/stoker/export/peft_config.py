"""`adapter_config.json`: LoRA settings as PEFT writes and reads them.

A setting that changes what an adapter computes and that Stoker does not know is refused by name, never ignored.
Meaning of the keys: https://huggingface.co/docs/peft/package_reference/lora
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stoker.adapters.settings import LoraSettings
from stoker.adapters.targets import short
from stoker.errors import ModelError, Problem

FILE = "adapter_config.json"

# Say nothing about what a finished adapter computes; which layers it is on is read from its tensors.
_INFORMATIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # how the base stores its weight
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
    }
)
_READ = frozenset({"lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora"})
# Initialisations that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, ...) need a changed base.
_HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": _HARMLESS_INITS,
}


def write(
    settings: LoraSettings,
    *,
    targets: Sequence[str],
    base_name: str,
    revision: str | None,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`; `parameters` are those of experts."""
    alpha = settings.alpha
    return ({"target_parameters": list(parameters)} if parameters else {}) | {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "peft_type": "LORA",
        "r": settings.rank,
        "revision": revision,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": settings.dora,
        "use_rslora": settings.rank_stabilized,
    }


def read(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Returns the settings in `config`, parsed from `path`; raises ModelError naming every setting it cannot follow."""
    problems = [Problem(what, str(path), "Stoker cannot load this adapter.") for what in _unsupported(config)]
    if problems:
        raise ModelError(problems)
    try:
        return LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_stabilized=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
        )
    except KeyError as error:
        raise ModelError(f"the setting {error} is missing.", where=str(path), fix="Save the adapter again.") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"a setting is no valid number: {error}.", where=str(path), fix="Mend it.") from error


def target_modules(adapted: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Returns the shortest `target_modules` by which PEFT finds exactly `adapted` among all `linears` of the blocks."""
    last = sorted(set(map(short, adapted)))
    same = {name for name in linears if short(name) in last} == set(adapted)
    # A place in a list is also that of layers, which PEFT would take for targets.
    return last if same and not any(map(str.isdigit, last)) else sorted(adapted)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        return [f"peft_type is {kind!r}, not 'LORA'."]
    problems = [] if task in (None, "CAUSAL_LM") else [f"task_type is {task!r}, not 'CAUSAL_LM'."]
    for key in sorted(config.keys() - _INFORMATIVE - _READ):
        value = config[key]
        neutral = value in _NEUTRAL[key] if key in _NEUTRAL else value in (None, False) or value in ([], {})
        if not neutral:
            problems.append(f"{key} is {value!r}, which is not supported.")
    return problems
