"""Number formats, memory, attention and plugins, most of which the plan decides."""

import re
from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl import adapter
from stoker.config.axolotl.entries import at, honoured
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import asks, flag, is_off, number

Whole = Mapping[str, Any]

_GIB = {"gib": 1.0, "gb": 1e9 / 2**30, "mib": 1 / 1024, "mb": 1e6 / 2**30, "": 1.0}


def precision(reading: Reading) -> Outcome:
    """`bf16`, `fp16` and the names of training without mixed precision."""
    keys = reading.whole
    wants_bf16 = asks(keys, "bf16") or asks(keys, "bfloat16")
    wants_fp16 = asks(keys, "fp16") or asks(keys, "float16")
    name = reading.name
    if name == "bf16" and str(reading.value) == "auto":
        return honoured({at("engine.precision"): "fp16" if wants_fp16 else "auto"})
    if wants_bf16 and wants_fp16:
        raise UnreadableError("the file asks for bf16 and for fp16.", "Keep one of them.")
    if wants_bf16:
        chosen = "bf16"
    elif wants_fp16:
        chosen = "fp16"
    elif (name in ("bf16", "fp16") and _is_no(keys, "bf16")) or (name == "float32" and not is_off(reading.value)):
        chosen = "fp32"
    else:
        return Outcome("no effect", "off; the other keys decide")
    note = "trained weights stay fp32" if name in ("bfloat16", "float16") else ""
    return honoured({at("engine.precision"): chosen}, note)


def _is_no(keys: Whole, name: str) -> bool:
    value = keys.get(name, "auto")
    return value not in ("auto", "full") and not flag(value)


def fp8(reading: Reading) -> Outcome:
    """`fp8`: products in fp8 over a frozen base; where every weight is trained they are bf16, which is more exact."""
    if not flag(reading.value):
        return Outcome("no effect", "off, as it is here")
    if adapter.has_adapter(reading.whole):
        return honoured({at("model.quantization"): "fp8"})
    note = "products are bf16, more exact, where every weight is trained; fp8 is done over a base under an adapter"
    return Outcome("no effect", note)


def memory(reading: Reading) -> Outcome:
    """`gpu_memory_limit`: gigabytes, or text with a unit."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(reading.value))
    unit = match.group(2).lower() if match else "?"
    if match is None or unit not in _GIB:
        raise UnreadableError("it must be a number of GiB, or text such as 20GiB.")
    return honoured({at("engine.memory_limit_gib"): round(number(match.group(1)) * _GIB[unit], 6)})


def recompute(reading: Reading) -> Outcome:
    """`gradient_checkpointing`: the plan keeps as much as fits and computes the rest again, with the same result."""
    value = reading.value
    if value in ("offload", "offload_disk", "unsloth"):
        return Outcome("automatic", "the plan recomputes and offloads as far as memory demands; the result is the same")
    flag(value)
    return Outcome("automatic", "the plan recomputes as far as memory demands, layer by layer; the result is the same")


def offload(reading: Reading) -> Outcome:
    """`activation_offloading`."""
    if reading.value not in ("legacy", "disk", "hidden_states"):
        flag(reading.value)
    return Outcome("automatic", "the plan lets activations wait in host memory where the GPU's demands it")


_ATTENTION = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flash_attention_torch",
    "flex_attention",
    "xformers",
    "sage",
    "fp8",
    "s2",
)
_COARSE = {"sage": "8 bits", "fp8": "fp8"}


def attention(reading: Reading) -> Outcome:
    """`attn_implementation`: every exact one gives the same result, so the plan chooses."""
    name = str(reading.value)
    if name in _COARSE or name == "s2":
        return _other(name)
    if name not in _ATTENTION and "/" not in name:
        short = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"}.get(name)
        raise UnreadableError(
            f"{name} is no attention that Axolotl knows.", f"Use {short or 'one of ' + ', '.join(_ATTENTION)}."
        )
    return Outcome("automatic", "the plan chooses how attention runs; packed documents never see one another")


def _other(name: str) -> Outcome:
    """Attention that is not the exact one: coarse numbers are not needed, and a sparse pattern is another model."""
    if name in _COARSE:
        return Outcome("automatic", f"attention is exact, in the run's precision, instead of {_COARSE[name]}")
    nearest = "Remove it: every token sees all before it, as the model was trained."
    return Outcome("refused", f"shifted sparse attention ({name}) is not done. {nearest}")


def attention_flag(name: str) -> Any:
    """Returns the rule of one of the boolean keys that came before `attn_implementation`."""

    def read(reading: Reading) -> Outcome:
        if not flag(reading.value):
            return Outcome("no effect", "off")
        others = [other for other in ATTENTION_FLAGS if other != reading.name and asks(reading.whole, other)]
        if others:
            raise UnreadableError(f"{reading.name} and {others[0]} are both true.", "Keep one of them.")
        if name in _COARSE or name == "s2":
            return _other(name)
        return Outcome("automatic", f"attn_implementation: {name} under its old name; the plan chooses")

    return read


ATTENTION_FLAGS = {
    "xformers_attention": "xformers",
    "s2_attention": "s2",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
"""The boolean keys -> the name that replaced them."""
PLUGINS: dict[str, tuple[str, str]] = {
    "cut_cross_entropy": ("automatic", "the loss is computed in chunks, over trained tokens only"),
    "liger": ("automatic", "fused kernels of our own"),
    "kernels": ("automatic", "fused kernels of our own, for experts too"),
    "expert_parallel": ("no effect", "several GPUs: not in this version"),
    "context_parallel": ("automatic", "context_parallel_size alone says it"),
    "spectrum": ("refused", "Spectrum's choice of layers is not done. Name them with unfrozen_parameters."),
    "grokfast": ("refused", "Grokfast is not done. Remove the plugin."),
    "kd": ("refused", "distillation is not done. Remove the plugin to train on the rows."),
    "lm_eval": ("refused", "tasks of lm-eval are not run after training. Run lm_eval on the folder that is saved."),
    "llm_compressor": ("refused", "sparse fine-tuning is not done. Remove the plugin."),
    "diffusion": ("refused", "diffusion language models are not trained. Use a causal model."),
    "swanlab": ("refused", "SwanLab is not written to. Use wandb_project, use_mlflow or use_tensorboard."),
    "densemixer": ("refused", "DenseMixer's gradients for routers are not done. Remove the plugin."),
    "mora": ("refused", "MoRA is not done. Use adapter: lora."),
    "nemo_gym": ("refused", "reinforcement learning is not done. Use supervised rows."),
    "hatchery": ("refused", "training on a remote service is not done. Remove the plugin."),
    "aux_free_router": ("refused", "balancing routers without a loss is not done. Remove the plugin."),
}
"""Axolotl's own plugins, by the name of their package."""
_PLUGIN_CLASSES = {"cut_cross_entropy": "CutCrossEntropyPlugin", "liger": "LigerPlugin", "kernels": "KernelsPlugin"}


def plugin(reading: Reading) -> Outcome:
    """One entry of `plugins`: the name of a class."""
    name = str(reading.value)
    match = re.match(r"axolotl\.integrations\.(\w+)", name)
    if match and match.group(1) in PLUGINS:
        kind, text = PLUGINS[match.group(1)]
        expected, given = _PLUGIN_CLASSES.get(match.group(1)), name.rpartition(".")[2]
        if expected not in (None, given):
            raise UnreadableError(f"{given} is no plugin of Axolotl's.", f"Did you mean {expected}?")
        return Outcome(kind, text)  # pyrefly: ignore[bad-argument-type]
    if "CutCrossEntropy" in name or "cut_cross_entropy" in name:
        return Outcome("automatic", PLUGINS["cut_cross_entropy"][1])
    return Outcome("refused", f"the plugin {name} is not known, and code of plugins is not run. Remove it.")
