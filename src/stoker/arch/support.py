"""What works for which model type: the table that `stoker models` and docs/models.md show. No torch.

Native rows come from the registry of families; all that is recorded here is about the classes of Transformers that are
tried out. Both are held to what tests find on tiny checkpoints (tests/parity/test_support.py), so that the table cannot
claim what is not so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
    text".
    """

    model_type: str
    path: Literal["native", "borrowed"]
    family: str
    layers: Literal["kernel", "op by op"] = "op by op"
    lora: bool = True
    nf4: bool = True
    fp8: bool = True
    packing: Literal["at once", "by document"] = "at once"
    recompute: bool = True
    export: bool = True
    generation: Literal["cache", "whole text"] = "cache"

    def cells(self) -> list[str]:
        """Returns what works in words, in the order of COLUMNS."""
        values = [getattr(self, column) for column in COLUMNS]
        return [("yes" if value else "no") if isinstance(value, bool) else value for value in values]


COLUMNS = ("layers", "lora", "nf4", "fp8", "packing", "recompute", "export", "generation")
"""The fields of a row that say what works."""


def _borrowed(model_type: str, family: str, **facts: str) -> Support:
    return Support(model_type, "borrowed", family, **facts)  # type: ignore[arg-type]


_TRIED = (
    _borrowed("apertus", "Apertus"),
    _borrowed("arcee", "Arcee"),
    _borrowed("bitnet", "BitNet b1.58"),
    _borrowed("bloom", "BLOOM", packing="by document"),
    _borrowed("codegen", "CodeGen"),
    _borrowed("ernie4_5", "ERNIE 4.5"),
    _borrowed("gpt_bigcode", "GPT-BigCode, StarCoder"),
    _borrowed("gpt_neo", "GPT-Neo", packing="by document"),
    _borrowed("gptj", "GPT-J"),
    _borrowed("helium", "Helium"),
    _borrowed("mpt", "MPT", packing="by document"),
    _borrowed("nemotron", "Nemotron"),
    _borrowed("openai-gpt", "GPT", packing="by document", generation="whole text"),
    _borrowed("opt", "OPT"),
    _borrowed("persimmon", "Persimmon"),
    _borrowed("recurrent_gemma", "RecurrentGemma", packing="by document", generation="whole text"),
    _borrowed("rwkv", "RWKV 4", packing="by document"),
    _borrowed("seed_oss", "Seed-OSS"),
    _borrowed("vaultgemma", "VaultGemma"),
    _borrowed("xglm", "XGLM", packing="by document"),
)


def rows() -> Iterator[Support]:
    """Yields the table: native model types in the registry's order, then the borrowed ones that were tried out."""
    for model_type, family in FAMILIES.items():
        name = getattr(family, "__name__", model_type).rpartition(".")[2]
        yield Support(model_type, "native", name, _layers(model_type))
    yield from (row for row in _TRIED if row.model_type not in FAMILIES)


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
