"""Optimisers: every name that Axolotl or Transformers knows is one of ours or refused by name."""

from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl.entries import at, honoured
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import advice, is_off, number

_PAGED = "its state is not paged to the host's memory"
_EIGHT_BITS = "8 bits a value instead of fewer"

OPTIMIZERS: dict[str, tuple[str, str]] = {
    "adamw_torch": ("adamw", ""),
    "adamw_torch_fused": ("adamw", ""),
    "adamw_torch_xla": ("adamw", ""),
    "adamw_torch_npu_fused": ("adamw", ""),
    "adamw_apex_fused": ("adamw", ""),
    "adamw_hf": ("adamw", ""),
    "adamw_anyprecision": ("adamw", "its averages are fp32"),
    "optimi_adamw": ("adamw", ""),
    "flash_adamw": ("adamw", "its averages are fp32"),
    "paged_adamw": ("adamw", _PAGED),
    "paged_adamw_32bit": ("adamw", _PAGED),
    "adamw_8bit": ("adamw_8bit", ""),
    "adamw_bnb_8bit": ("adamw_8bit", ""),
    "adamw_torch_8bit": ("adamw_8bit", ""),
    "ao_adamw_8bit": ("adamw_8bit", ""),
    "paged_adamw_8bit": ("adamw_8bit", _PAGED),
    "adamw_torch_4bit": ("adamw_8bit", _EIGHT_BITS),
    "ao_adamw_4bit": ("adamw_8bit", _EIGHT_BITS),
    "ao_adamw_fp8": ("adamw_8bit", "8-bit integers instead of fp8"),
    "adafactor": ("adafactor", ""),
    "sgd": ("sgd", ""),
    "flash_sgd": ("sgd", ""),
    "muon": ("muon", ""),
}
"""Axolotl's name -> our kind, and how the meaning shifts."""

_ADAMW = "Use adamw_torch_fused"
NO_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(("lion_8bit", "lion_32bit", "lion", "paged_lion_32bit", "paged_lion_8bit", "flash_lion"), _ADAMW),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADAMW),
    **dict.fromkeys(("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adagrad"), _ADAMW),
    **dict.fromkeys(
        (
            "galore_adamw",
            "galore_adamw_8bit",
            "galore_adafactor",
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw",
            "apollo_adamw_layerwise",
            "q_galore_adamw8bit",
            "lomo",
            "adalomo",
        ),
        "Use adafactor, whose state takes next to no memory, or an adapter",
    ),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw"), _ADAMW),
    "schedule_free_sgd": "Use sgd",
    **dict.fromkeys(("adopt_adamw", "stable_adamw", "grokadamw", "adamc", "flash_adam"), _ADAMW),
    **dict.fromkeys(("came_pytorch",), "Use adafactor"),
    **dict.fromkeys(("dion", "sinkgd", "polora"), "Use muon"),
    "flash_sgdw": "Use sgd",
}
"""Optimisers that are not done -> the nearest that is."""

_WITH_BETAS = ("adamw", "adamw_8bit", "muon")
_ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999}


def kind(keys: Mapping[str, Any]) -> str:
    """Returns our kind of the file's optimiser; AdamW where it is not one of ours, which its own key refuses."""
    return OPTIMIZERS.get(str(keys.get("optimizer", "adamw_torch_fused")), ("adamw", ""))[0]


def optimizer(reading: Reading) -> Outcome:
    """`optimizer`."""
    name = str(reading.value)
    if name in NO_OPTIMIZERS:
        return Outcome("refused", f"the optimiser {name} is not done. {NO_OPTIMIZERS[name]}.")
    if name not in OPTIMIZERS:
        raise UnreadableError(
            f"{name} is no optimiser that Axolotl knows.", advice(name, [*OPTIMIZERS, *NO_OPTIMIZERS])
        )
    ours, note = OPTIMIZERS[name]
    return honoured({at("train.optimizer.kind"): ours}, note)


def beta(reading: Reading) -> Outcome:
    """`adam_beta1` and `adam_beta2`."""
    if kind(reading.whole) not in _WITH_BETAS:
        return Outcome("no effect", f"{kind(reading.whole)} has no betas")
    given = [number(reading.whole.get(name, default)) for name, default in _ADAM_DEFAULTS.items()]
    return honoured({at("train.optimizer.betas"): given})


def epsilon(reading: Reading) -> Outcome:
    """`adam_epsilon`."""
    if kind(reading.whole) not in _WITH_BETAS:
        return Outcome("no effect", f"{kind(reading.whole)} has no epsilon")
    return honoured({at("train.optimizer.epsilon"): number(reading.value)})


def weight_decay(reading: Reading) -> Outcome:
    """`weight_decay`: not on embeddings, which the Trainer of Transformers lets decay."""
    value = number(reading.value)
    is_shifted = value and not reading.other("adapter")
    note = "not on embeddings, unless train.optimizer.decay_all" if is_shifted else ""
    return honoured({at("train.optimizer.weight_decay"): value}, note)


def arguments(reading: Reading) -> Outcome:
    """`optim_args`: only what is so here anyway."""
    given = reading.value
    if isinstance(given, str):
        given = dict(pair.split("=", 1) for pair in given.replace(" ", "").split(",") if "=" in pair)
    if isinstance(given, Mapping) and set(given) <= {"bf16_stochastic_round"}:
        return Outcome("automatic", "trained weights are fp32, so nothing is rounded to bf16")
    return Outcome(
        "refused",
        "arguments of an optimiser's own are not passed on. Use adam_beta1, adam_beta2, adam_epsilon, weight_decay.",
    )


def embedding_rate(reading: Reading) -> Outcome:
    """`embedding_lr`, and `embedding_lr_scale`, which wins, as a multiple of the learning rate."""
    if not is_off(reading.other("adapter") or False):
        return Outcome("no effect", "an adapter trains no embedding")
    scale = reading.other("embedding_lr_scale")
    if reading.name == "embedding_lr" and scale is not None:
        return Outcome("no effect", "embedding_lr_scale decides")
    rate = number(reading.value)
    if reading.name == "embedding_lr_scale":
        rate *= number(reading.other("learning_rate") or 0)
    return honoured({at("train.embedding_learning_rate"): rate})
