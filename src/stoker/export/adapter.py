"""Adapter folders in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<Hugging Face module>.lora_A.weight`, `.lora_B.weight` and, with DoRA,
`.lora_magnitude_vector`; each Hugging Face layer has its own, whatever layers are kept as one weight here. Those of
experts belong to Transformers' 3-D parameters (`expert_adapters`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stoker.adapters.experts import LoraExperts, expert_layers, lora_experts
from stoker.adapters.lora import Awaited, LoraPart, LoraSummary, add_lora, linear_shapes, lora_layers
from stoker.adapters.settings import LoraSettings
from stoker.checkpoint import tensors as safetensors_file
from stoker.checkpoint.durable import DurableFile
from stoker.errors import ModelError, OutputError
from stoker.export import expert_adapters, peft_config
from stoker.models.borrowed.load import other_linears
from stoker.models.borrowed.model import BorrowedModel

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_A, _B, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_KEY = re.compile(rf"base_model\.model\.(?P<name>.+)\.(?P<kind>{_A}|{_B}|{_MAGNITUDE})(\.weight)?")
_MAX_NAMED = 4


def save(model: nn.Module, folder: Path, *, base_name: str, revision: str | None = None) -> None:
    """Writes the adapters of `model` to `folder`, in fp32; an adapter already there is replaced once all is written.

    `base_name` is the Hub id or folder that PEFT will load the base from, `revision` its commit or tag. Raises
    ValueError when the model has no adapters, OutputError when the folder cannot be written.
    """
    layers, experts = list(lora_layers(model)), list(lora_experts(model))
    if not layers and not experts:
        raise ValueError("the model has no adapters")
    parts = [part for layer in layers for part in layer.adapters()]
    tensors = {_key(part.name, kind): tensor.detach() for part in parts for kind, tensor in _by_kind(part).items()}
    tensors |= _of_experts(model, experts)
    config = peft_config.write(
        [*layers, *experts][0].settings,
        targets=peft_config.target_modules([part.name for part in parts], _linears(model)),
        parameters=expert_adapters.target_parameters(layer.name for layer in experts),
        base_name=base_name,
        revision=revision,
    )
    fix = "Free space there, or name another folder."
    aside = [folder / f"{name}.partial" for name in (WEIGHTS_FILE, peft_config.FILE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside[0].unlink(missing_ok=True)  # of a process that was killed
        with DurableFile(aside[0]) as file:
            safetensors_file.write(file, tensors)
        aside[1].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in aside:
            path.replace(path.with_suffix(""))
    except OSError as error:
        for path in aside:
            path.unlink(missing_ok=True)
        raise OutputError(
            f"the adapter cannot be written: {error.strerror or error}.", where=str(folder), fix=fix
        ) from error


def load(model: nn.Module, folder: Path, *, awaited: Awaited | None = None) -> LoraSummary:
    """Puts the adapters of `folder`, written by Stoker or by PEFT, on `model`, ready for training or decoding.

    Raises ModelError when the folder is none, holds pickled weights, uses settings of PEFT that Stoker does not know,
    or does not fit the model; the model is then left without adapters. `awaited`: as in `add_lora`.
    """
    stored = open_stored(model, folder)
    settings = stored.settings
    summary = add_lora(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=stored.names,
        dropout=settings.dropout,
        rank_stabilized=settings.rank_stabilized,
        dora=settings.dora,
        awaited=awaited,
    )
    with torch.no_grad():
        for part in (part for layer in lora_layers(model) for part in layer.adapters()):
            tensors = stored.read(part.name)
            for kind, parameter in _by_kind(part).items():
                parameter.copy_(tensors[kind])
        for layer in lora_experts(model):
            expert_adapters.from_peft(layer, stored.read(layer.name))
    return summary


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder, known to fit a model: `names` of what it adapts, as `add_lora` takes targets.

    Those are Hugging Face's linear layers, and of experts the parameters that hold them.
    """

    settings: LoraSettings
    names: tuple[str, ...]
    _path: Path
    _keys: Mapping[tuple[str, str], str]

    def read(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of one of `names`: "lora_A" [rank, in], "lora_B" [out, rank] and, with DoRA,
        "lora_magnitude_vector" [out]; of experts as PEFT holds them (`expert_adapters`)."""
        with safe_open(self._path, framework="pt") as file:
            return {
                kind: file.get_tensor(self._keys[name, kind])
                for kind in (_A, _B, _MAGNITUDE)
                if (name, kind) in self._keys
            }


def open_stored(model: nn.Module, folder: Path) -> StoredAdapter:
    """Returns the adapter of `folder`, whose values are read when asked for; `model`, without adapters, stays as it is.

    Raises ModelError as `load` does.
    """
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    settings = peft_config.read(config, folder / peft_config.FILE)
    keys, shapes = _stored_tensors(path)
    keys = _named_by_parameter(model, keys, config.get("target_parameters") or ())
    names = sorted({name for name, _ in keys})
    expected = _expected(names, linear_shapes(model), settings) | _expected_of_experts(model, names, settings)
    named = config.get("base_model_name_or_path")
    _check({which: shapes[key] for which, key in keys.items()}, expected, path, f", {named}" if named else "")
    return StoredAdapter(settings, tuple(names), path, keys)


def base_of(folder: Path) -> tuple[str, str | None]:
    """Returns the base model that an adapter folder names, a Hub id or a folder, and its revision if one is named.

    Raises ModelError when the folder holds no adapter, or one that names no base.
    """
    config = _read_config(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        where = str(folder / peft_config.FILE)
        raise ModelError(
            "base_model_name_or_path is empty.", where=where, fix="Name the base model yourself, with --base."
        )
    return str(name), None if revision is None else str(revision)


def _linears(model: nn.Module) -> list[str]:
    """Hugging Face's linear layers, on which PEFT may put adapters; those of experts are none there."""
    of_experts = {layer.name for layer in expert_layers(model)}
    own = other_linears(model) if isinstance(model, BorrowedModel) else []
    return [*(name for name in linear_shapes(model) if name not in of_experts), *own]


def _of_experts(model: nn.Module, layers: Sequence[LoraExperts]) -> dict[str, Tensor]:
    """PEFT's tensors of the adapters on experts."""
    modules = expert_adapters.modules(expert_layers(model), {layer.name for layer in layers})
    tensors = {}
    for layer in layers:
        for kind, tensor in zip((_A, _B), expert_adapters.to_peft(layer), strict=True):
            tensors[_key(modules[layer.name], kind)] = tensor
    return tensors


def _named_by_parameter(
    model: nn.Module, tensors: Mapping[tuple[str, str], str], targets: Sequence[str]
) -> dict[tuple[str, str], str]:
    """The tensors' keys with those of experts under the name of the parameter that they adapt."""
    layers = list(expert_layers(model))
    adapted = {layer.name for layer in layers if expert_adapters.is_target(layer.name, targets)}
    names = {module: name for name, module in expert_adapters.modules(layers, adapted).items()}
    return {(names.get(module, module), kind): tensor for (module, kind), tensor in tensors.items()}


def _expected_of_experts(
    model: nn.Module, names: Sequence[str], settings: LoraSettings
) -> dict[tuple[str, str], tuple[int, ...]]:
    expected: dict[tuple[str, str], tuple[int, ...]] = {}
    for layer in expert_layers(model):
        if layer.name in names:
            expected[layer.name, _A], expected[layer.name, _B] = expert_adapters.shapes(layer, settings.rank)
    return expected


def _by_kind(part: LoraPart) -> dict[str, Tensor]:
    tensors = {_A: part.a, _B: part.b}
    return tensors if part.magnitude is None else {**tensors, _MAGNITUDE: part.magnitude}


def _key(name: str, kind: str) -> str:
    return f"base_model.model.{name}.{kind}" + ("" if kind == _MAGNITUDE else ".weight")


def _expected(
    names: Sequence[str], shapes: Mapping[str, tuple[int, int]], settings: LoraSettings
) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shape of every tensor that an adapter on `names` has, leaving out names that the model does not know."""
    expected: dict[tuple[str, str], tuple[int, ...]] = {}
    for name in names:
        if name in shapes:
            out_features, in_features = shapes[name]
            expected[name, _A], expected[name, _B] = (settings.rank, in_features), (out_features, settings.rank)
            if settings.dora:
                expected[name, _MAGNITUDE] = (out_features,)
    return expected


def _check(
    tensors: Mapping[tuple[str, str], tuple[int, ...]],
    expected: Mapping[tuple[str, str], tuple[int, ...]],
    path: Path,
    base: str,
) -> None:
    """Raises ModelError naming the tensors that are missing, too many, or of another shape than expected."""
    problems = [f"{_key(*which)} is missing" for which in sorted(expected.keys() - tensors.keys())]
    problems += [f"{_key(*which)} fits nothing in this model" for which in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{_key(*which)} has shape {list(tensors[which])}, not {list(shape)}"
        for which, shape in sorted(expected.items())
        if which in tensors and tensors[which] != shape
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ModelError(
            f"the adapter does not fit: {'; '.join(problems[:_MAX_NAMED])}{more}.",
            where=str(path),
            fix=f"Load it on the base model that it was trained on{base}.",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / peft_config.FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"there is no adapter here: {peft_config.FILE} is missing."
        raise ModelError(what, where=str(folder), fix="Name the folder that a run or PEFT saved.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"it cannot be read: {error}.", where=str(path), fix="Save the adapter again.") from error
    if not isinstance(config, dict):
        raise ModelError("it holds no JSON object.", where=str(path), fix="Save the adapter again.")
    return config


def _stored_tensors(path: Path) -> tuple[dict[tuple[str, str], str], dict[str, tuple[int, ...]]]:
    """Returns the keys of a file's tensors by Hugging Face module name and kind, and their shapes by key."""
    if not path.is_file():
        pickled = path.with_name(_PICKLED_FILE).is_file()
        what = f"{_PICKLED_FILE} is a pickle, which can run code" if pickled else f"{path.name} is missing"
        raise ModelError(f"{what}.", where=str(path.parent), fix="Save the adapter again with safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"it cannot be read: {error}.", where=str(path), fix="Copy or save it again.") from error
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    foreign = sorted(key for key, match in matches.items() if match is None)
    if foreign or not tensors:
        what = f"it holds {', '.join(foreign[:_MAX_NAMED])}, not part of a LoRA adapter" if foreign else "it is empty"
        raise ModelError(f"{what}.", where=str(path), fix="Stoker cannot load this adapter.")
    return {(match["name"], match["kind"]): key for key, match in matches.items() if match is not None}, tensors
