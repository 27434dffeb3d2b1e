"""`stoker merge`: from names to folders, and the report in words."""

from pathlib import Path

from stoker.compose import artifact, unfinished
from stoker.compose.model import open_base
from stoker.errors import ConfigError, ModelError

_DTYPES = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def merge(
    name: str, output: Path, *, base: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> str:
    """Merges the adapter that `name` stands for into its base, in `output`, and returns what was verified.

    A checkpoint's folder stands for the adapter or the whole model that it holds, by however many processes written.
    `trust_remote_code` lets code that comes with the base run, as a run's configuration may.

    Raises:
        ConfigError: an unknown dtype. ModelError: `name` is no adapter, or it does not fit. OutputError: `output` is
            not empty.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not a number format.", fix=f"Use one of {', '.join(_DTYPES)}.")
    if unfinished.is_checkpoint(name):
        with unfinished.adapter(name) as folder:
            if folder is None:
                return unfinished.write_model(name, output, dtype=_DTYPES[dtype])
            return _merge(str(folder), output, base=base, dtype=dtype, trust_remote_code=trust_remote_code)
    return _merge(name, output, base=base, dtype=dtype, trust_remote_code=trust_remote_code)


def _merge(name: str, output: Path, *, base: str | None, dtype: str, trust_remote_code: bool) -> str:
    found = artifact.find(name, base=base)
    if found.adapter is None:
        raise ModelError(f"{name} is not an adapter, so there is nothing to merge.", fix="Use it as it is.")
    import torch

    from stoker.export import merged

    chosen = _DTYPES[dtype]
    trusted = trust_remote_code or found.trust_remote_code
    opened = open_base(found.base, revision=found.revision, trust_remote_code=trusted)
    report = merged.merge(
        opened.folder,
        found.adapter,
        output,
        dtype=getattr(torch, chosen) if chosen else None,
        trust_remote_code=trusted,
        overrides=found.overrides,
    )
    written = str(report.dtype).removeprefix("torch.")
    return (
        f"merged {report.num_layers} layers of {found.adapter} into {found.base}, in {written}\n"
        f"verified: logits differ from adapter and base by {report.max_difference:.2g} at most "
        f"(allowed {report.tolerance:.2g}; the adapter itself moves them by {report.adapter_effect:.2g})\n"
        f"written to {report.folder}{_note(found)}"
    )


def _note(found: artifact.Artifact) -> str:
    """What to know of an adapter whose base was quantised: the sum of the two is in full precision."""
    if found.quantization in (None, "none"):
        return ""
    return (
        f"\nnote: the adapter was trained on {found.base} in {found.quantization} and is merged into the weights as "
        "the folder holds them, so answers differ slightly from those of stoker chat on the run"
    )
