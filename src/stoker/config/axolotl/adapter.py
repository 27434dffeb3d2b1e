"""The adapter and the base's quantisation: keys that only mean something together."""

import re
from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl.entries import at, custom, honoured
from stoker.config.axolotl.outcome import Entry, Outcome, Reading, Rule, UnreadableError
from stoker.config.axolotl.values import Convert, flag, is_off, texts, whole
from stoker.config.document import Path

Whole = Mapping[str, Any]

NOT_LINEAR = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")
"""Names of embeddings and heads, which LoRA here leaves alone."""
_LAYER_LISTS = "layers|h|blocks|block|layer"


def has_adapter(keys: Whole) -> bool:
    """Whether the file trains an adapter."""
    return not is_off(keys.get("adapter") or False)


def adapter(reading: Reading) -> Outcome:
    """`adapter`: lora, or qlora, which is lora on a base in 4 bits."""
    name, keys = str(reading.value).lower(), reading.whole
    if is_off(reading.value):
        return Outcome("no effect", "every weight is trained, as it is here without an adapter")
    if name not in ("lora", "qlora"):
        return Outcome("refused", f"adapter: {name} is not done. Use lora or qlora.")
    if name == "qlora" and not _in_4bit(keys):
        raise UnreadableError("adapter: qlora needs load_in_4bit: true.", "Set it, or use adapter: lora.")
    if keys.get("lora_r") is None:
        raise UnreadableError(f"adapter: {name} needs lora_r.", "Set it, for example lora_r: 16.")
    if keys.get("lora_alpha") is None:
        raise UnreadableError(f"adapter: {name} needs lora_alpha.", "Set it, for example lora_alpha: 32.")
    is_dora = flag(keys.get("peft_use_dora", False))
    settings: dict[Path, Any] = {at("adapter.kind"): "dora" if is_dora else "lora"}
    if not _targets_given(keys):
        settings[at("adapter.targets")] = "all-dense"
        note = "no targets are named, where Axolotl stops: every linear layer gets an adapter"
        return honoured(settings, note)
    return honoured(settings)


def _in_4bit(keys: Whole) -> bool:
    return flag(keys.get("load_in_4bit", False)) or _backend(keys) == ("bnb", "nf4")


def _backend(keys: Whole) -> tuple[Any, Any]:
    """Returns the base's quantisation where it is written as a mapping: its backend and its format."""
    for name in ("model_quantization_config", "peft"):
        given = keys.get(name)
        if isinstance(given, Mapping) and given.get("backend"):
            return given.get("backend"), given.get("weight_dtype")
    return None, None


def _targets_given(keys: Whole) -> bool:
    names = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")
    return any(keys.get(name) is not None and not is_off(keys[name]) for name in names)


def part(path: str, convert: Convert) -> Entry:
    """Returns the entry of a key that is a field of our adapter; without an adapter it has no effect."""
    return custom("honoured", f"`{path}`", with_adapter(lambda reading: honoured({at(path): convert(reading.value)})))


def with_adapter(rule: Rule) -> Rule:
    """Returns the rule with every value that belongs to an adapter left unread where there is none."""

    def read(reading: Reading) -> Outcome:
        if not has_adapter(reading.whole):
            return Outcome("no effect", "there is no adapter: every weight is trained")
        return rule(reading)

    return read


def quantization(reading: Reading) -> Outcome:
    """`load_in_4bit` and `load_in_8bit`."""
    keys = reading.whole
    if not flag(reading.value):
        return Outcome("no effect", "off, as it is here")
    if flag(keys.get("load_in_4bit", False)) and flag(keys.get("load_in_8bit", False)):
        raise UnreadableError("load_in_4bit and load_in_8bit are both true.", "Keep one of them.")
    if not has_adapter(keys):
        raise UnreadableError(
            f"{reading.name} freezes the base, but without an adapter its weights are what is trained.",
            "Set adapter: qlora or lora, or remove it.",
        )
    return honoured({at("model.quantization"): "nf4" if reading.name == "load_in_4bit" else "int8"})


def quantization_config(reading: Reading) -> Outcome:
    """`model_quantization_config` and `peft`: bitsandbytes' formats, as a mapping."""
    backend, dtype = _backend(reading.whole)
    formats = {("bnb", "nf4"): "nf4", ("bnb", "int8"): "int8", ("torchao", "nf4"): "nf4", ("torchao", "int8"): "int8"}
    given = reading.value
    if isinstance(given, Mapping) and given.get("loftq_config"):
        return Outcome("refused", "LoftQ's start is not done. Leave it out: adapters start at zero, as PEFT's do.")
    if (backend, dtype) in formats:
        return with_adapter(lambda _: honoured({at("model.quantization"): formats[backend, dtype]}))(reading)
    return Outcome("refused", f"{given!r} is not done. Use load_in_4bit or load_in_8bit with an adapter.")


def mxfp4(reading: Reading) -> Outcome:
    """`model_quantization_config`, a name or a mapping."""
    if isinstance(reading.value, Mapping):
        return quantization_config(reading)
    what = f"weights stored in the format of {reading.value} are not read"
    return Outcome("refused", f"{what}. Name a copy of the model in bf16 as base_model.")


def bitsandbytes(reading: Reading) -> Outcome:
    """`bnb_config_kwargs`: what QLoRA's NF4 is anyway."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    fine = {
        "bnb_4bit_use_double_quant": (True,),
        "bnb_4bit_quant_type": ("nf4",),
        "llm_int8_has_fp16_weight": (False,),
        "load_in_4bit": (True,),
    }
    free = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
    wrong = [
        f"{key}: {value}" for key, value in reading.value.items() if key not in free and value not in fine.get(key, ())
    ]
    if wrong:
        nearest = "The base is NF4 with scales quantised in their turn (load_in_4bit), or int8 (load_in_8bit)."
        return Outcome("refused", f"{', '.join(wrong)} is not done. {nearest}")
    return Outcome("automatic", "NF4 with scales quantised in their turn; products in the run's precision")


_PART_OF_LAYERS = Outcome("honoured", "part of adapter.targets, see peft_layers_to_transform")


def linear_targets(reading: Reading) -> Outcome:
    """`lora_target_linear`: every linear layer, which holds those of lora_target_modules too."""
    if is_off(reading.value):
        return Outcome("no effect", "off: lora_target_modules decides")
    if reading.other("peft_layers_to_transform") is not None:
        return _PART_OF_LAYERS
    return honoured({at("adapter.targets"): "all-linear" if _expert_parameters(reading.whole) else "all-dense"})


def _expert_parameters(keys: Whole) -> list[str]:
    """Returns the parameters of experts that the file names; a mixture keeps all of a layer's in one."""
    return texts(keys.get("lora_target_parameters") or [])


def parameters(reading: Reading) -> Outcome:
    """`lora_target_parameters`: experts, which `lora_target_linear` does not take."""
    names = _expert_parameters(reading.whole)
    if not is_off(reading.other("lora_target_linear") or False):
        return Outcome("honoured", "adapter.targets: all-linear, which takes experts")
    return honoured({at("adapter.targets"): _together(reading.other("lora_target_modules") or [], names)})


def _together(modules: Any, parameters: list[str]) -> str | list[str]:
    """Returns targets that are modules and parameters of experts: a list, or where modules are an expression, one."""
    if not isinstance(modules, str):
        return [*texts(modules), *parameters]
    if not parameters:
        return modules
    return rf"(?:{modules})|.*\.(?:{'|'.join(map(re.escape, parameters))})"


def targets(reading: Reading) -> Outcome:
    """`lora_target_modules`: names, or one regular expression for whole names."""
    given = reading.value
    names = given if isinstance(given, list) else [given]
    for name in texts(names):
        if name.rpartition(".")[2] in NOT_LINEAR:
            nearest = "Leave it out; lora_modules_to_save trains it whole."
            return Outcome("refused", f"LoRA on the embedding or the head ({name}) is not done. {nearest}")
    if reading.other("peft_layers_to_transform") is not None:
        return _PART_OF_LAYERS
    if not is_off(reading.other("lora_target_linear") or False):
        return Outcome("honoured", "lora_target_linear takes every linear layer, these among them")
    return honoured({at("adapter.targets"): _together(given, _expert_parameters(reading.whole))})


def layers(reading: Reading) -> Outcome:
    """`peft_layers_to_transform`: the targets as a regular expression that names the layers."""
    given = reading.value if isinstance(reading.value, list) else [reading.value]
    numbers = "|".join(str(whole(item)) for item in given)
    lists = reading.other("peft_layers_pattern")
    names = "|".join(map(re.escape, texts(lists))) if lists else _LAYER_LISTS
    inner = ".*"
    if is_off(reading.other("lora_target_linear") or False) and reading.other("lora_target_modules"):
        modules = reading.other("lora_target_modules")
        if isinstance(modules, str):
            raise UnreadableError("it needs lora_target_modules as a list.", "Write the layers into the expression.")
        inner = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, texts(modules)))})"
    return honoured({at("adapter.targets"): rf".*\.(?:{names})\.(?:{numbers})\.{inner}"})


def start(reading: Reading) -> Outcome:
    """`peft_init_lora_weights`: PEFT's own start is ours."""
    if reading.value in (True, "true", "True", "kaiming"):
        return Outcome("automatic", "A uniform, B zero, as PEFT's default")
    nearest = "Leave it out: A uniform, B zero."
    return Outcome("refused", f"adapters that start as {reading.value!r} are not done. {nearest}")


def dora(reading: Reading) -> Outcome:
    """`peft_use_dora`."""
    return honoured({at("adapter.kind"): "dora" if flag(reading.value) else "lora"})


def rank(value: Any) -> int:
    """Returns a rank: a whole number of at least 1."""
    found = whole(value)
    if found < 1:
        raise UnreadableError("it must be at least 1.")
    return found


_ROWS = re.compile(r".+\[[0-9]*(?::[0-9]*)?\]")


def unfrozen(reading: Reading) -> Outcome:
    """`unfrozen_parameters`: expressions that match from a name's start, in which a dot is a dot."""
    patterns = texts(reading.value)
    if has_adapter(reading.whole):
        nearest = "Leave it out: under an adapter every weight of the model is frozen."
        return Outcome("refused", f"weights that train beside an adapter are not done. {nearest}")
    rows = next((pattern for pattern in patterns if _ROWS.fullmatch(pattern)), None)
    if rows is not None:
        nearest = "Name the whole weight, without the range."
        return Outcome("refused", f"training some rows of a weight ({rows}) is not done. {nearest}")
    # As Axolotl does: a dot is escaped, unless it stands for any letters in `.+`.
    return honoured({at("train.only"): [re.sub(r"(?<!\\)\.(?!\+)", r"\\.", pattern) for pattern in patterns]})
