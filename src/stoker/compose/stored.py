"""Whether a model's folder holds a tokenizer, and the weights that its config.json speaks of, without reading them."""

from pathlib import Path

from stoker.arch.borrowed import AnySpec
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError, Problem
from stoker.models import weight_names
from stoker.models.folder import missing_tokenizer, weight_files


def problems(folder: Path, spec: AnySpec, *, needs_tokenizer: bool) -> list[Problem]:
    """Returns what loading would say of the folder's files and, for a native model, of its tensors' names."""
    missing = missing_tokenizer(folder) if needs_tokenizer else None
    return [*_weights(folder, spec), *([missing] if missing else [])]


def _weights(folder: Path, spec: AnySpec) -> list[Problem]:
    try:
        index = weight_files(folder)
    except ModelError as error:
        return list(error.problems)
    if not isinstance(spec, ArchSpec):
        return []  # which tensors a class of Transformers makes, it alone knows
    names, _ = weight_names.of_folder(index)
    found = weight_names.find(spec, names).problems
    return weight_names.listed(found, folder) if found else []
