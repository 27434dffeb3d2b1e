"""A model's folder: found locally or on the Hub, its configuration, weight files and tokenizer."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.errors import ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
"""Bytes; the format allows no more."""
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "Fetch the model again."

# What a Hub id brings: weights, configuration and tokenizer, from the top of the repository only.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class WeightIndex:
    """Where each tensor of a folder lies: `files[tensor name]` is a safetensors file inside `folder`."""

    folder: Path
    files: Mapping[str, Path]


def resolve(name: str | Path, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The local folder of a model: `name` itself when it is one, else the Hub id's files, fetched unless cached.

    Pickled weights are never fetched, and code only `with_code`. `revision`: a branch, tag or commit of the Hub id.
    Under `HF_HUB_OFFLINE=1` only the cache is looked at. Raises ModelError for a folder or id that is not there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError("this is a file, not a model's folder.", where=str(name), fix="Name the folder that holds it.")
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("there is no such folder.", where=str(name), fix="Name a folder that is there, or a Hub id.")
    return _from_hub(name, revision, [*_WANTED, *(["*.py"] if with_code else [])])


def _from_hub(name: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except hub.HFValidationError as error:
        raise ModelError("this is neither a folder nor a Hub id.", where=name, fix="A Hub id is owner/name.") from error
    except hub.GatedRepoError as error:
        what, fix = (
            "this model is gated.",
            f"Ask for access at https://huggingface.co/{name}, then run `hf auth login`.",
        )
        raise ModelError(what, where=name, fix=fix) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        what = "there is no such folder here, and no such model" + (f" at revision {revision}" if revision else "")
        fix = "Check its name and the revision; a private model needs `hf auth login`."
        raise ModelError(f"{what} on the Hub.", where=name, fix=fix) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        what = "there is no such folder here, the Hub's cache does not hold this model, and the Hub was not reached."
        fix = "Unset HF_HUB_OFFLINE or mend the connection, or name a local folder."
        raise ModelError(what, where=name, fix=fix) from error
    except (hub.HTTPError, OSError) as error:
        raise ModelError(f"fetching from the Hub failed: {error}", where=name, fix="Try again.") from error


def missing_tokenizer(folder: Path) -> Problem | None:
    """What is wrong with a model's folder that holds no tokenizer; None for one that does."""
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return Problem(
        f"there is no tokenizer: none of {', '.join(_TOKENIZER_FILES)}.",
        where=str(folder),
        fix="Copy the tokenizer's files there, or name another folder or Hub id as model.tokenizer.",
    )


def load_tokenizer(folder: Path | str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model's folder, its own code never run; raises ModelError when it is missing or broken."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if missing := missing_tokenizer(folder):
        raise ModelError([missing])
    for path in sorted(folder.glob("tokenizer*.json")):
        _read_json(path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(folder), fix=_AGAIN) from error
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer's files into `folder`; raises OSError where the disk does not take them."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if type(error) is not Exception or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def read_config(folder: Path | str) -> dict[str, Any]:
    """The parsed `config.json` of a model's folder; raises ModelError when it is missing or broken."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            "there is no config.json, so this is not a model's folder.",
            where=str(folder),
            fix="Name a folder written by save_pretrained, or a Hub id.",
        )
    return _read_json(path)


def weight_files(folder: Path | str) -> WeightIndex:
    """Where each tensor lies, from one safetensors file or an index of several.

    Raises ModelError when there are only pickled weights, a shard is missing, broken or outside the folder, or a shard
    lacks a tensor that the index promises.
    """
    folder = Path(folder)
    if (folder / _INDEX).is_file():
        return _from_index(folder)
    if (folder / _SINGLE).is_file():
        return WeightIndex(folder, dict.fromkeys(_tensor_names(folder / _SINGLE), folder / _SINGLE))
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"the only weights are pickled ({', '.join(pickled[:3])}), and unpickling runs whatever code they hold.",
            where=str(folder),
            fix="Convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors.",
        )
    raise ModelError(
        f"there are no weights: neither {_SINGLE} nor {_INDEX}.", where=str(folder), fix="Fetch the model again."
    )


def _from_index(folder: Path) -> WeightIndex:
    path = folder / _INDEX
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError("there is no `weight_map` of tensor names to file names.", where=str(path), fix=_AGAIN)
    names_in = {shard: _shard_names(folder, shard) for shard in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in names_in[shard]:
            raise ModelError(f"{shard} does not hold {tensor}, which the index promises.", where=str(path), fix=_AGAIN)
    # What a shard holds beyond the index is no less part of the checkpoint.
    files = {name: folder / shard for shard, names in names_in.items() for name in names}
    return WeightIndex(folder, files)


def _shard_names(folder: Path, shard: str) -> set[str]:
    """The tensors of a shard; raises ModelError for one that is missing or not directly in the folder."""
    if Path(shard).name != shard or shard in ("..", "."):
        raise ModelError(
            f"the index names the shard {shard!r}, which is not a file directly in this folder.",
            where=str(folder / _INDEX),
            fix="Do not use this checkpoint unless you trust where it comes from; a shard's name has no folders.",
        )
    if not (folder / shard).is_file():
        raise ModelError(f"the shard {shard}, which the index names, is missing.", where=str(folder), fix=_AGAIN)
    return _tensor_names(folder / shard)


def _tensor_names(path: Path) -> set[str]:
    """The names in a safetensors file's header, without the library, which loads numpy or torch.

    Eight bytes hold the header's length, then comes a JSON object of tensors and where their bytes lie
    (https://huggingface.co/docs/safetensors).
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header would have {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, and its header speaks of {end:,}")
    except (ValueError, OSError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"this is not a whole safetensors file ({error}).", where=str(path), fix=_AGAIN) from error
    return set(header)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"this is not readable JSON ({error}).", where=str(path), fix=_AGAIN) from error
    if not isinstance(value, dict):
        raise ModelError("this is not a JSON object.", where=str(path), fix=_AGAIN)
    return value
