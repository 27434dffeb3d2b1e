"""A base model and an adapter made into one folder that Transformers loads, checked before it is called done."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from stoker.arch.borrowed import BorrowedSpec
from stoker.errors import ModelError
from stoker.export import borrowed_merge
from stoker.export.companions import copy_companions
from stoker.export.merged_tensors import MergedTensors
from stoker.export.new_folder import refuse_occupied
from stoker.export.streamed import Progress, no_progress, written
from stoker.export.verify import TOLERANCES, MergeReport, compare
from stoker.models import open as models
from stoker.models import writer
from stoker.models.folder import read_config


def merge(
    base: Path,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    max_shard_bytes: int = writer.DEFAULT_SHARD_BYTES,
    progress: Progress = no_progress,
) -> MergeReport:
    """Writes the model in `base` with the adapter merged into its weights to `out`, with its tokenizer's files.

    Each tensor keeps the dtype that it has in `base`, or gets `dtype`; sums are in fp32. A native model is merged and
    checked a tensor at a time, whatever its size: beyond one tensor, or one projection group in fp32, memory holds the
    adapter. One that runs through Transformers is held in memory in fp32 (`borrowed_merge`).

    Checked: each merged layer computes in fp32 what base and adapter do; the files read again hold what was written;
    and by logits of a few rows of random tokens, that rounding to the dtype stays within a tolerance and does not drown
    the adapter. Only then does `out` appear. A tokenizer beside the adapter goes before that of the base.
    `trust_remote_code` lets code that comes with the base run; `overrides` are changes to its config.json.
    Raises OutputError when `out` holds anything or cannot be written, ModelError when base or adapter cannot be used
    or the dtype is too coarse for the adapter, and StokerError when another check fails.
    """
    refuse_occupied(out)
    config = read_config(base) | dict(overrides or {})
    spec = models.read(base, config, trust_remote_code=trust_remote_code)
    if dtype is not None and dtype not in TOLERANCES:
        allowed = ", ".join(map(_name, TOLERANCES))
        raise ModelError(f"weights in {_name(dtype)} cannot be written.", where=str(base), fix=f"Use one of {allowed}.")
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    if isinstance(spec, BorrowedSpec):
        return borrowed_merge.merge(
            base, adapter_folder, out, spec, config=kept, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
    with ExitStack() as stack:
        tensors = MergedTensors(base, spec, adapter_folder, stack, dtype=dtype)
        coarsest = max(tensors.dtypes, key=TOLERANCES.__getitem__)
        with written(tensors, out, config=kept, max_shard_bytes=max_shard_bytes, progress=progress) as aside:
            copy_companions(base, adapter_folder, aside)
            found = compare(base, adapter_folder, aside, spec, progress=progress)
            return found.judge(coarsest, out=out, num_layers=tensors.num_layers)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
