"""A borrowed model from a folder: its facts, its weights, and back into a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stoker.arch.borrowed import BorrowedMixer, BorrowedSpec
from stoker.arch.spec import LayerSpec, NormSpec
from stoker.errors import ModelError, Problem
from stoker.models.borrowed import checks, find, swaps
from stoker.models.borrowed.answers import REFUSALS
from stoker.models.borrowed.model import BorrowedModel
from stoker.models.folder import weight_files
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.quant.formats import quantize
from stoker.quant.fp8 import MAX_RELATIVE_ERROR, Fp8Weight, product_error
from stoker.quant.frozen import Scratch

_MAX_NAMED = 8
# Masks and tables that follow from the configuration, which old checkpoints hold among their weights.
_OLD_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".causal_mask", ".inv_freq", ".position_ids")
_NUM_INPUTS = 32
# Scores are quadratic in a row's length, which facts do not know: rows are taken to be of the usual length. Kept are
# the softmax's result, and a copy of it in another type or after dropout.
_ROW_TOKENS, _SCORE_COPIES = 2048, 2


def read(folder: Path, *, why: str, is_remote: bool) -> BorrowedSpec:
    """Returns the facts of the model in `folder`, from its class made without memory for weights.

    `why` says why it is not native; `is_remote`: its class comes with it, and running that code is allowed. Raises
    ModelError when Transformers cannot make it, or when it lacks what Stoker needs of a model.
    """
    config = find.config_of(folder, trust_remote_code=is_remote)
    find.refuse_encoder(config)
    model = find.on_meta(config, trust_remote_code=is_remote)
    path, blocks = find.find_blocks(model)
    _, head = find.find_head(model)
    text = config.get_text_config()
    hidden_size = getattr(text, "hidden_size", head.in_features)
    num_heads = getattr(text, "num_attention_heads", None) or 0
    head_dim = getattr(text, "head_dim", None) or (hidden_size // num_heads if num_heads else 0)
    positions = find.max_positions(config)
    keeps_scores = num_heads > 0 and not find.has_fused_attention(model)
    score_values = _SCORE_COPIES * num_heads * min(positions, _ROW_TOKENS) if keeps_scores else 0
    layers = (_layer(block, num_heads * head_dim, score_values) for block in blocks)
    shared = find.shared_linears(model)
    return BorrowedSpec(
        model_type=str(config.model_type),
        class_name=type(model).__name__,
        vocab_size=head.out_features,
        hidden_size=hidden_size,
        max_positions=positions,
        layers=tuple(layers),
        layers_name=path,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        packs=find.takes_attention(model),
        is_remote=is_remote,
        why=why,
        shared=tuple(sorted(shared)),
    )


def _layer(block: nn.Module, attention_width: int, score_values: int) -> LayerSpec:
    found = ((name, module) for name, module in block.named_modules() if find.is_linear(module))
    linears = tuple((name, *find.linear_shape(module)) for name, module in found)
    mixer: Any = BorrowedMixer(linears, attention_width, score_values)
    return LayerSpec(mixer=mixer, feed_forward=None, norm=NormSpec())


def load(
    folder: Path,
    spec: BorrowedSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
    quantization: str = "none",
) -> BorrowedModel:
    """Returns the model with its weights on `device`, in evaluation mode, checked against its own class.

    Host memory holds the whole model in `dtype` meanwhile; the device never holds more than one layer that is not yet
    quantised. With "fp8", layers whose output it would move too far keep `dtype`. `notices` of the result say what runs
    another way than for a native model.

    Raises ModelError when weights are missing, unexpected or of another shape, and when the model is not causal.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype, "kernels": kernels, "quantization": quantization}
    try:
        return _load(folder, spec, swap=True, **options)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:  # the class looks into a norm or a feed-forward, and found one of ours
        pass
    try:
        return _load(folder, spec, swap=False, **options)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        what = f"{spec.class_name} does not run with its linear layers replaced: {error}"
        raise ModelError(what, where=str(folder), fix="Train it with Transformers itself.") from error


def _load(
    folder: Path,
    spec: BorrowedSpec,
    *,
    swap: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    kernels: str,
    quantization: str,
) -> BorrowedModel:
    """The model, with our norms and feed-forwards in it if `swap`."""
    plain = _with_weights(folder, spec, dtype=dtype).eval()
    shared = find.shared_linears(plain)
    if swap:
        swaps.replace_gated(plain, kernels=kernels, but=shared)
    convert = _Converter(quantization, device=torch.device(device), kernels=kernels)
    _convert_fused(plain, convert)
    transposed = swaps.replace_linears(plain, convert, but=shared)
    plain.to(device)
    if swap:
        swaps.replace_norms(plain, kernels=kernels)
    model = BorrowedModel(plain, kernels=kernels).eval()
    model.transposed = transposed
    if shared:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in shared if not name[-1].isdigit()}))
        model.notices.append(
            f"{len(shared)} linear layers ({names}) are neither quantised nor have adapters, because each shares its "
            "weight with another layer's"
        )
    checks.check(model)
    return model


def tensors(model: BorrowedModel) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the class's own state by its name, as detached views; a tied one once."""
    seen = set()
    inside: tuple[str, ...] = ()
    for path, module in model.model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, FusedLinear):
            inside = (*inside, f"{path}.")
            yield from _parts(module, model.transposed)
            continue
        own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is None or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield (f"{path}.{name}" if path else name), tensor.detach()


def parameter_names(model: BorrowedModel) -> dict[str, tuple[str, ...]]:
    """The class's own names of what each parameter of `model` holds; gate and up, for example, are one here."""
    names: dict[str, tuple[str, ...]] = {}
    for name, _ in model.named_parameters():
        names[name] = (name.removeprefix("model."),)
    for path, module in model.named_modules():
        if isinstance(module, FusedLinear):
            for kind in ("weight", "bias"):
                if f"{path}.{kind}" in names:
                    names[f"{path}.{kind}"] = tuple(f"{part}.{kind}" for part in module.names)
    return names


def other_linears(model: BorrowedModel) -> list[str]:
    """The class's names of the linear layers that are still its own, as those outside of the layers are."""
    return [name for name, module in model.model.named_modules() if find.is_linear(module)]


def _parts(layer: FusedLinear, transposed: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    weight = layer.weight.detach()
    for name, rows in zip(layer.names, layer.slices, strict=True):
        yield f"{name}.weight", weight[rows].T if name in transposed else weight[rows]
        if layer.bias is not None:
            yield f"{name}.bias", layer.bias.detach()[rows]


def _with_weights(folder: Path, spec: BorrowedSpec, *, dtype: torch.dtype) -> nn.Module:
    """The class's instance on the CPU, every weight of it from safetensors."""
    from transformers import AutoModelForCausalLM

    weight_files(folder)  # says what is wrong with them in our words; pickled ones are refused
    options: dict[str, Any] = {
        "config": find.config_of(folder, trust_remote_code=spec.is_remote),
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": spec.is_remote,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        fix = "Fetch the model again, or mend its config.json."
        raise ModelError(f"Transformers cannot load this model: {error}", where=str(folder), fix=fix) from error
    model, info = loaded
    _refuse(info, folder)
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _refuse(info: dict[str, Any], folder: Path) -> None:
    """Raises ModelError for weights that Transformers did not find, did not use, or could not fit in."""
    kinds = {
        "missing_keys": "is missing: Transformers would make it up",
        "unexpected_keys": "is not part of this architecture",
        "mismatched_keys": "has another shape than config.json makes it",
    }
    found = [
        Problem(f"tensor {key[0] if isinstance(key, tuple) else key} {what}.", str(folder))
        for kind, what in kinds.items()
        for key in sorted(info.get(kind) or (), key=str)
        if kind != "unexpected_keys" or not str(key).endswith(_OLD_BUFFERS)
    ]
    if found:
        more = [Problem(f"{len(found) - _MAX_NAMED} tensors more are wrong.")] if len(found) > _MAX_NAMED else []
        fix = Problem("The weights do not fit config.json.", fix="Fetch the model again, or mend its config.json.")
        raise ModelError([*found[:_MAX_NAMED], *more, fix])


class _Converter:
    """Moves a linear layer to the device, in the frozen format `kind` or, with "none", as it is."""

    def __init__(self, kind: str, *, device: torch.device, kernels: str) -> None:
        self._kind, self._device, self._kernels = kind, device, kernels
        self._scratch = Scratch()

    def __call__(self, layer: FusedLinear) -> nn.Module:
        layer = layer.to(self._device)
        if self._kind == "none":
            return layer
        weight = layer.weight.detach()
        matrix = quantize(
            weight,
            self._kind,
            part_rows=layer.out_features,
            scratch=self._scratch,
            implementation=self._kernels,
        )
        if isinstance(matrix, Fp8Weight) and not self._holds(matrix, weight, layer.out_features):
            return layer
        return FrozenLinear(layer, cast("nn.Module", matrix)).train(layer.training)

    def _holds(self, matrix: Fp8Weight, weight: Tensor, part_rows: tuple[int, ...]) -> bool:
        """Whether fp8 keeps the output of inputs with alike channels within its bound."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_NUM_INPUTS, weight.shape[1], generator=generator).to(weight.device)
        return product_error(matrix, x, x @ weight.float().T, part_rows) <= MAX_RELATIVE_ERROR


def _convert_fused(model: nn.Module, convert: _Converter) -> None:
    """Converts the linear layers that are ours already: those of gated feed-forwards."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is FusedLinear:
                setattr(parent, name, convert(child))
