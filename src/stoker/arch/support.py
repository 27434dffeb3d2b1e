"""What works for which model type: the table that `stoker models` and docs/models.md show. No torch.

Rows are the registry's families and the classes of Transformers that are tried out. What works is in support.toml,
which the tests' results on tiny checkpoints make (tests/parity/conftest.py): a cell that no test has found is "no".
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from stoker.arch.families import FAMILIES, read
from stoker.arch.shape import why_not_llama
from stoker.errors import ModelError

# Types whose published models multiply residuals, which the defaults of their configurations do not.
_SCALED = frozenset({"granite"})


@dataclass(frozen=True)
class Support:
    """A row: how a model type runs, and what works.

    `layers`: "kernel" if a layer of the type's default configuration can be one operation, else "op by op". `packing`:
    packed rows run "at once", or document "by document". `generation`: from a "cache", or each token from the "whole
    text". `held_to`: what it is tested for beside Transformers' class on tiny checkpoints, by the tests' names.
    """

    model_type: str
    path: Literal["native", "borrowed"]
    family: str
    layers: Literal["kernel", "op by op"]
    lora: bool
    nf4: bool
    fp8: bool
    packing: Literal["at once", "by document", "no"]
    recompute: bool
    export: bool
    generation: Literal["cache", "whole text", "no"]
    held_to: tuple[str, ...]

    def cells(self) -> list[str]:
        """Returns what works in words, in the order of COLUMNS."""
        values = [getattr(self, column) for column in COLUMNS]
        return [("yes" if value else "no") if isinstance(value, bool) else value for value in values]


COLUMNS = ("layers", "lora", "nf4", "fp8", "packing", "recompute", "export", "generation")
"""The fields of a row that say what works."""


TRIED = {
    "apertus": "Apertus",
    "arcee": "Arcee",
    "bitnet": "BitNet b1.58",
    "bloom": "BLOOM",
    "codegen": "CodeGen",
    "ernie4_5": "ERNIE 4.5",
    "gpt_bigcode": "GPT-BigCode, StarCoder",
    "gpt_neo": "GPT-Neo",
    "gptj": "GPT-J",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan dense",
    "mpt": "MPT",
    "nemotron": "Nemotron",
    "openai-gpt": "GPT",
    "opt": "OPT",
    "persimmon": "Persimmon",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv": "RWKV 4",
    "seed_oss": "Seed-OSS",
    "vaultgemma": "VaultGemma",
    "xglm": "XGLM",
    "zamba2": "Zamba 2",
}
"""Model types of Transformers' classes that tests run, with the models' own name."""


def rows() -> Iterator[Support]:
    """Yields the table: native model types in the registry's order, then the borrowed ones that were tried out."""
    for model_type, family in FAMILIES.items():
        name = getattr(family, "__name__", model_type).rpartition(".")[2]
        yield _row(model_type, "native", name, _layers(model_type))
    for model_type, name in TRIED.items():
        if model_type not in FAMILIES:
            yield _row(model_type, "borrowed", name, "op by op")


def _row(
    model_type: str, path: Literal["native", "borrowed"], family: str, layers: Literal["kernel", "op by op"]
) -> Support:
    found = results().get(model_type, {})
    # Of a native model packed rows run at once and answers come from a cache, or it does not at all.
    packing, generation = found.get("packing", "no"), found.get("generation", "no")
    return Support(
        model_type=model_type,
        path=path,
        family=family,
        layers=layers,
        lora="lora" in found,
        nf4="nf4" in found,
        fp8="fp8" in found,
        packing="at once" if packing is True else packing,
        recompute="recompute" in found,
        export="export" in found,
        generation="cache" if generation is True else generation,
        held_to=tuple(found),
    )


@cache
def results() -> Mapping[str, Mapping[str, Any]]:
    """Returns what tests have found: model type to property to True, or to how it is there ("by document")."""
    return tomllib.loads(resources.files("stoker.arch").joinpath("support.toml").read_text(encoding="utf-8"))


def _layers(model_type: str) -> Literal["kernel", "op by op"]:
    """Whether the layer kernel runs layers of a native type in the sizes that a configuration has by default."""
    try:
        spec = read({"model_type": model_type}, "the defaults")
    except ModelError:  # it has no default for something, as for the order of a hybrid's layers
        return "op by op"
    is_llama = any(not why_not_llama(layer) for layer in spec.layers) and model_type not in _SCALED
    return "kernel" if is_llama else "op by op"


def row_of(model_type: str) -> Support | None:
    """Returns the row of a model type; None for one that is neither native nor tried out."""
    return next((row for row in rows() if row.model_type == model_type), None)
