"""Families of architectures: Hugging Face's `config.json` to `ArchSpec`, and their weight names to ours.

Adding a family is one file here, one line in `FAMILIES`, one parity test and one example.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from stoker.arch.families import (
    arcee,
    bamba,
    cohere,
    deepseek,
    ernie4_5,
    exaone4,
    falcon,
    falcon_h1,
    gemma,
    glm,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granite_hybrid,
    helium,
    internlm,
    jamba,
    llama,
    mamba,
    mamba2,
    minicpm3,
    mixtures,
    nemotron,
    nemotron_h,
    olmo,
    phi,
    phi3,
    qwen,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from stoker.arch.spec import ArchSpec, WeightEntry
from stoker.errors import ModelError


class Family(Protocol):
    """What a family's module offers."""

    def read(self, config: Mapping[str, Any], where: str) -> ArchSpec:
        """The spec that `config` describes; `where` names the file in errors."""
        ...

    def weight_map(self, spec: ArchSpec) -> tuple[WeightEntry, ...]:
        """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds."""
        ...


FAMILIES: dict[str, Family] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": qwen,
    "qwen3": qwen,
    "gemma": gemma,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "phi": phi,
    "phi3": phi3,
    "falcon": falcon,
    "gpt_neox": gpt_neox,
    "gpt2": gpt2,
    "stablelm": stablelm,
    "olmo": olmo,
    "olmo2": olmo,
    "olmo3": olmo,
    "smollm3": smollm3,
    "granite": granite,
    "minicpm": granite,
    "minicpm3": minicpm3,
    "cohere": cohere,
    "cohere2": cohere,
    "starcoder2": starcoder2,
    "exaone4": exaone4,
    "glm": glm,
    "glm4": glm,
    "internlm2": internlm,
    "internlm3": internlm,
    "arcee": arcee,
    "seed_oss": seed_oss,
    "ernie4_5": ernie4_5,
    "helium": helium,
    "nemotron": nemotron,
    "mixtral": mixtures,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "qwen2_moe": mixtures,
    "qwen3_moe": mixtures,
    "olmoe": mixtures,
    "granitemoe": mixtures,
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "falcon_h1": falcon_h1,
    "jamba": jamba,
    "bamba": bamba,
    "nemotron_h": nemotron_h,
    "granitemoehybrid": granite_hybrid,
}
"""The native `model_type`s and the module that reads each."""


def read(config: Mapping[str, Any], where: str) -> ArchSpec:
    """The `ArchSpec` of a parsed `config.json`.

    Raises ModelError for a model type that is not native, and for any setting that the family does not compute:
    one that would change the result is never ignored.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "config.json names no `model_type`, so its architecture is unknown.",
            where=where,
            fix="Point model.base at a folder written by Transformers' save_pretrained.",
        )
    if model_type not in FAMILIES:
        raise ModelError(
            f'model_type "{model_type}" is not native to Stoker yet.',
            where=where,
            fix=f"Native today: {', '.join(FAMILIES)}. Until then, Transformers with PEFT trains this model.",
        )
    return FAMILIES[model_type].read(config, where)


def weight_map(spec: ArchSpec) -> tuple[WeightEntry, ...]:
    """Every parameter of a `Decoder` built from `spec`, with the Hugging Face tensors it holds, in file order."""
    return FAMILIES[spec.model_type].weight_map(spec)
