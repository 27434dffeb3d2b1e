"""A model's folder by the path that it takes: native where a family reads it, else through Transformers' own class."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.arch import families
from stoker.arch.borrowed import BorrowedSpec
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError
from stoker.models import native, writer
from stoker.models.borrowed import load as borrowed
from stoker.models.borrowed.find import remote_class
from stoker.models.borrowed.model import BorrowedModel
from stoker.nn.decoder import Decoder

Spec = ArchSpec | BorrowedSpec
Model = Decoder | BorrowedModel

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one state of a repository for good: a commit of 40 hexadecimal digits."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def read(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Spec:
    """Returns the facts of the model in `folder` with the parsed `config`.

    Native if a family computes all that the configuration asks for, else borrowed. `trust_remote_code` lets code that
    comes with the model run, if Transformers has no class for it. Raises ModelError, with the reasons of both paths,
    for a model that neither can take.
    """
    where = str(folder / "config.json")
    try:
        return families.read(config, where)
    except ModelError as error:
        refusal = error
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise refusal
    _refuse_quantized(config, where)
    why = refusal.problems[0].what
    if _transformers_has(model_type):
        try:
            return borrowed.read(folder, why=why, is_remote=False)
        except ModelError as error:
            raise (_both(refusal, error) if model_type in families.FAMILIES else error) from error
    try:
        _refuse_remote_code(config, where, trust_remote_code=trust_remote_code)
    except ModelError as error:  # the family may need less than leave to run code: a setting, put right
        raise (_both(refusal, error) if model_type in families.FAMILIES else error) from error
    return borrowed.read(folder, why=why, is_remote=True)


def load(
    folder: Path,
    spec: Spec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
    quantization: str = "none",
) -> Model:
    """Returns the model of `spec` with the weights of `folder`; the arguments are those of `native.load`."""
    module = borrowed if isinstance(spec, BorrowedSpec) else native
    loaded: Any = module.load(folder, spec, device=device, dtype=dtype, kernels=kernels, quantization=quantization)  # type: ignore[arg-type]
    return loaded


def save(
    model: Model,
    spec: Spec,
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    source: Path,
    max_shard_bytes: int = writer.DEFAULT_SHARD_BYTES,
) -> None:
    """Writes `model` as a folder that Transformers loads: weights, and `config` with the weights' dtype.

    The code of a model that brings its own comes from the folder `source`. Raises OutputError when it cannot be
    written.
    """
    writer.write(hf_tensors(model, spec), folder, config=config, max_shard_bytes=max_shard_bytes)
    if isinstance(spec, BorrowedSpec) and spec.is_remote:
        for path in sorted(source.glob("*.py")):
            shutil.copyfile(path, Path(folder) / path.name)


def hf_tensors(model: Model, spec: Spec) -> Iterable[tuple[str, Tensor]]:
    """Each Hugging Face tensor's name and its rows of our parameters, as detached views."""
    if isinstance(model, BorrowedModel):
        return borrowed.tensors(model)
    assert isinstance(spec, ArchSpec)
    return native.hf_tensors(model, spec)


def _both(native: ModelError, borrowed: ModelError) -> ModelError:
    """What the family refused, and why the class of another, which would be the remedy, cannot have it either."""
    problem, other = native.problems[0], borrowed.problems[0]
    return ModelError(
        problem.what, where=problem.where, fix=f"{other.what.removesuffix('.')}. {other.fix or ''}".strip()
    )


def _transformers_has(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _is_of_another_kind(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Refuses weights that are stored quantised: Transformers would leave them so, in layers that are not linear."""
    if stored_quantization(config, where) != "none":
        raise ModelError(
            "weights that bitsandbytes stored in NF4 are read for native architectures only, which this is not.",
            where=where,
            fix="Use the unquantised model with model.quantization: nf4, which gives the same values.",
        )


def _refuse_remote_code(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    model_type, reference = config.get("model_type"), remote_class(config)
    if reference is None and _is_of_another_kind(model_type):
        raise ModelError(
            f'model_type "{model_type}" is no causal language model: Transformers has it as an encoder, a pair of '
            "encoder and decoder, or a model of images or sound.",
            where=where,
            fix="Only causal language models are trained here (`stoker models` lists types). Where one is inside, save "
            "it as a folder of its own.",
        )
    if reference is None:
        raise ModelError(
            f'model_type "{model_type}" is neither native nor a causal language model of Transformers.',
            where=where,
            fix="Check model_type in config.json, or update Transformers (`stoker models` lists what there is).",
        )
    if "--" in reference:
        repository = reference.partition("--")[0]
        raise ModelError(
            f"its code lies in another repository, {repository}, which model.revision does not pin.",
            where=where,
            fix="Copy its files into the model's folder, and name them in auto_map without the repository.",
        )
    if not trust_remote_code:
        raise ModelError(
            f'Transformers has no class for model_type "{model_type}"; the model brings its own code ({reference}), '
            "which would run with all your rights on this machine.",
            where=where,
            fix="Read that code; then allow it: model.trust_remote_code: true in the YAML (elsewhere "
            "--trust-remote-code), and for a Hub id a revision that is the commit which you read.",
        )
