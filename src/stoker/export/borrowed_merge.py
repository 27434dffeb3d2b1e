"""An adapter merged into a model that runs through Transformers' own class, which is held in memory as a whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stoker.adapters.merge import merge_into
from stoker.arch.borrowed import BorrowedSpec
from stoker.errors import ModelError, StokerError
from stoker.export import adapter
from stoker.export.companions import copy_companions
from stoker.export.new_folder import new_folder
from stoker.export.verify import TOLERANCES, Differences, MergeReport, random_tokens
from stoker.models import open as models
from stoker.models.folder import weight_files


def merge(
    base: Path,
    adapter_folder: Path,
    out: Path,
    spec: BorrowedSpec,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> MergeReport:
    """Does what `merged.merge` does, with the model in memory in fp32, all in `dtype` or the widest of the base's.

    Checked by logits: merging in fp32 changes nothing, the written folder read again gives what was in memory, and
    rounding to the dtype stays within its tolerance.
    """
    dtype = dtype or _widest_dtype(base)
    tokens = random_tokens(spec.vocab_size, spec.max_positions)
    model = models.load(base, spec).eval()
    plain = _logits(model, tokens)
    adapter.load(model, adapter_folder)
    adapted = _logits(model.eval(), tokens)
    num_layers = merge_into(model)
    _require_equal(_logits(model, tokens), adapted, what="merging changed the answers", out=out)
    model.to(dtype)
    num_bytes = sum(tensor.nbytes for _, tensor in models.hf_tensors(model, spec))
    with new_folder(out, needed_bytes=num_bytes) as aside:
        models.save(model, spec, aside, config=config, source=base, max_shard_bytes=max_shard_bytes)
        copy_companions(base, adapter_folder, aside)
        rounded = _logits(model.float(), tokens)
        del model  # before the second is loaded
        read_again = _logits(models.load(aside, spec).eval(), tokens)
        _require_equal(read_again, rounded, what="what was written is not what was merged", out=out)
        largest, effect, difference = (
            part.abs().max().item() for part in (adapted, adapted - plain, read_again - adapted)
        )
        return Differences(largest, effect, difference).judge(dtype, out=out, num_layers=num_layers)


def _require_equal(logits: Tensor, expected: Tensor, *, what: str, out: Path) -> None:
    largest, difference = expected.abs().max().item(), (logits - expected).abs().max().item()
    if not difference <= TOLERANCES[torch.float32] * largest:  # a NaN is not within it either
        raise StokerError(
            f"{what}: logits up to {largest:.4g} differ by {difference:.4g}. The merged model was not kept.",
            where=str(out),
            fix="Check that the adapter's values are finite and that the disk is sound.",
        )


def _widest_dtype(base: Path) -> torch.dtype:
    """The widest dtype among the base's tensors."""
    dtypes = set()
    for path in set(weight_files(base).files.values()):
        with safe_open(path, framework="pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    unknown = sorted(dtypes - known.keys())
    if unknown:
        raise ModelError(
            f"it holds weights in {', '.join(unknown)}.", where=str(base), fix="Name a base in bf16 or fp32."
        )
    found = [known[name] for name in dtypes]
    return found[0] if len(found) == 1 else torch.float32


@torch.no_grad()
def _logits(model: models.Model, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))
