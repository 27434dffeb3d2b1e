"""Finds the class of a causal language model, and the parts of an instance that matter: layers, head, linear layers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from stoker.errors import ModelError

# What configurations call the context that the model was made for, in tokens.
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "context_length",
    "n_ctx",
    "seq_length",
)
# For models whose configuration names none, as those without positions do.
NO_LIMIT = 1 << 20


def config_of(folder: Path, *, trust_remote_code: bool) -> Any:
    """Returns Transformers' configuration of a model's folder; raises ModelError when it cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # each class checks its configuration in its own way, with errors of its own
        raise ModelError(
            f"Transformers cannot read this configuration: {_said(error)}",
            where=str(folder / "config.json"),
            fix="Mend config.json, or fetch the model again.",
        ) from error
    if hasattr(config, "rescale_every"):
        # RWKV divides weights in place between training and evaluation, against overflow in fp16. That changes
        # nothing in exact arithmetic, but is lost on a quantised weight and would end up in saved ones.
        config.rescale_every = 0
    return config


def on_meta(config: Any, *, trust_remote_code: bool) -> nn.Module:
    """Returns the model of a configuration without memory for its weights; raises ModelError when that fails."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as by dividing by a number of heads
        raise ModelError(
            f"Transformers cannot make this model: {_said(error)}",
            where=str(config.name_or_path),
            fix="Mend config.json, or fetch the model again.",
        ) from error
    return cast("nn.Module", model)


def _said(error: Exception) -> str:
    """What an error says, on one line; its kind where it says nothing that reads alone."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def refuse_encoder(config: Any) -> None:
    """Raises ModelError for an encoder: a type made for masked words, unless it says that it decodes.

    Transformers has causal classes of such types too, which look ahead all the same.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if is_masked and getattr(config, "is_decoder", None) is False:
        raise ModelError(
            f'model_type "{config.model_type}" is an encoder: each token sees those after it, so that there is no '
            "next token to learn.",
            where=str(config.name_or_path),
            fix="Name a causal model; if these weights were trained as one, set is_decoder: true in config.json.",
        )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer: `nn.Linear`, or the Conv1D of old classes, which stores [in, out].

    Subclasses compute something else, so they are none.
    """
    return type(module) is nn.Linear or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is Transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer."""
    rows, columns = cast("nn.Parameter", module.weight).shape
    return (rows, columns) if is_transposed(module) else (columns, rows)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of the model's layers: of its outermost lists, the one with most parameters.

    Raises ModelError when there is none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outermost:
        raise ModelError(
            f"{type(model).__name__} has no list of layers, so there is nothing to adapt or to compute again.",
            fix="Train it with Transformers itself.",
        )
    return max(outermost, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Returns the path and the module of the linear layer that makes logits.

    Raises ModelError when there is none.
    """
    found = cast("Any", model).get_output_embeddings()
    if found is None:
        vocab_size = getattr(cast("Any", model).config, "vocab_size", None)
        own = [child for child in model.children() if type(child) is nn.Linear and child.out_features == vocab_size]
        found = own[0] if len(own) == 1 else None
    path = next((name for name, module in model.named_modules() if module is found), None)
    if path is None or type(found) is not nn.Linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that turns hidden states into logits.",
            fix="Train it with Transformers itself.",
        )
    return path, found


def linears_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the full names and modules of the plain linear layers inside the model's layers."""
    path, blocks = find_blocks(model)
    for name, module in blocks.named_modules():
        if is_linear(module):
            yield f"{path}.{name}", module


def shared_linears(model: nn.Module) -> frozenset[str]:
    """Returns the names of the layers' linear layers whose weight several of them have, as Zamba 2's shared blocks do.

    An adapter of one could not be merged: its update would reach the others.
    """
    linears = [(name, module.weight) for name, module in linears_of_blocks(model)]
    uses = Counter(id(weight) for _, weight in linears)
    return frozenset(name for name, weight in linears if uses[id(weight)] > 1)


def max_positions(config: Any) -> int:
    """Returns the context that a configuration names, or NO_LIMIT."""
    text = config.get_text_config()
    sizes = (getattr(text, key, None) for key in _CONTEXT_KEYS)
    return next((size for size in sizes if isinstance(size, int) and size > 0), NO_LIMIT)


def takes_attention(model: nn.Module) -> bool:
    """Whether the model's class says that it takes attention functions from outside, with packed documents."""
    return bool(getattr(model, "_supports_attention_backend", False))


def has_fused_attention(model: nn.Module) -> bool:
    """Whether the class says that it can use PyTorch's attention, or ours, which keep no scores."""
    return takes_attention(model) or bool(getattr(model, "_supports_sdpa", False))


def remote_class(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the causal model's class that comes with the model, if its config.json names one."""
    auto_map = config.get("auto_map")
    reference = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    return reference if isinstance(reference, str) else None
