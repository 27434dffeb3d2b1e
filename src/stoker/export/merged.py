"""A base model and an adapter made into one folder that Transformers loads, checked before it is called done."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stoker.adapters.merge import merge_into
from stoker.errors import ModelError, OutputError, StokerError
from stoker.export import adapter, peft_config
from stoker.models import open as models
from stoker.models.folder import read_config, weight_files

# Largest allowed difference of a logit, as a share of the largest one. fp32: sums in another order. bf16 and fp16
# round a merged weight by up to 2^-9 and 2^-12 of itself; over tens of layers such errors add up to many times that.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Below this share of the largest logit, an adapter's effect is the noise of fp32 arithmetic: there is nothing to lose.
_NOISE = 1e-5
_NUM_ROWS, _NUM_TOKENS = 2, 32
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_COPIED_STEMS = ("license", "notice", "use_policy")


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and how near its answers are to those of base and adapter, on rows of random tokens.

    `num_layers` of Hugging Face's linear layers changed; `dtype` is that of the written weights. `max_difference` is
    the largest difference of a logit between the written model and base with adapter, `tolerance` what was allowed, and
    `adapter_effect` the largest difference that the adapter makes to the base; all computed in fp32.
    """

    folder: Path
    num_layers: int
    dtype: torch.dtype
    max_difference: float
    tolerance: float
    adapter_effect: float


def merge(
    base: Path,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Writes the model in `base` with the adapter merged into its weights to `out`, with its tokenizer's files.

    Weights keep the dtype they have in `base`, or get `dtype`; sums are in fp32, so memory must hold the model in fp32.
    Checked, by logits of a few rows of random tokens: merging in fp32 changes nothing, the written folder read again
    gives what was in memory, and rounding to the dtype stays within a tolerance and does not drown the adapter. Only
    then does `out` appear. A tokenizer beside the adapter goes before that of the base. `trust_remote_code` lets code
    that comes with the base run; `overrides` are changes to its config.json.
    Raises OutputError when `out` holds anything or cannot be written, ModelError when base or adapter cannot be used
    or the dtype is too coarse for the adapter, and StokerError when another check fails.
    """
    _refuse_occupied(out)
    config = read_config(base) | dict(overrides or {})
    spec = models.read(base, config, trust_remote_code=trust_remote_code)
    dtype = dtype or _stored_dtype(base)
    if dtype not in _TOLERANCE:
        allowed = ", ".join(map(_name, _TOLERANCE))
        raise ModelError(f"weights in {_name(dtype)} cannot be written.", where=str(base), fix=f"Use one of {allowed}.")
    tokens = _random_tokens(spec)
    model = models.load(base, spec).eval()
    plain = _logits(model, tokens)
    adapter.load(model, adapter_folder)
    adapted = _logits(model.eval(), tokens)
    num_layers = merge_into(model)
    _check_equal(_logits(model, tokens), adapted, what="merging changed the answers", out=out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as aside:
            written = Path(aside) / "model"
            models.save(model.to(dtype), spec, written, config=_of_plain_weights(config), source=base)
            _copy_files(base, adapter_folder, written)
            rounded = _logits(model.float(), tokens)
            del model  # before the second is loaded
            read_again = _logits(models.load(written, spec).eval(), tokens)
            _check_equal(read_again, rounded, what="what was written is not what was merged", out=out)
            report = _judge_rounding(plain, adapted, read_again, dtype=dtype, out=out, num_layers=num_layers)
            written.replace(out)
    except OSError as error:
        fix = "Free space there, or name another folder."
        raise OutputError(f"the merged model cannot be written: {error}.", where=str(out), fix=fix) from error
    return report


def _check_equal(logits: Tensor, expected: Tensor, *, what: str, out: Path) -> None:
    largest, difference = expected.abs().max().item(), (logits - expected).abs().max().item()
    if not difference <= _TOLERANCE[torch.float32] * largest:  # a NaN is not within it either
        raise StokerError(
            f"{what}: logits up to {largest:.4g} differ by {difference:.4g}. The merged model was not kept.",
            where=str(out),
            fix="Check that the adapter's values are finite and that the disk is sound.",
        )


def _judge_rounding(
    plain: Tensor, adapted: Tensor, merged: Tensor, *, dtype: torch.dtype, out: Path, num_layers: int
) -> MergeReport:
    """The report, if rounding to `dtype` left the adapter's answers recognisable; otherwise raises ModelError."""
    largest = adapted.abs().max().item()
    effect = (adapted - plain).abs().max().item()
    difference = (merged - adapted).abs().max().item()
    tolerance = _TOLERANCE[dtype] * largest
    lost = effect > _NOISE * largest and difference > effect / 2
    if lost or difference > tolerance:
        raise ModelError(
            f"rounding to {_name(dtype)} changes logits by up to {difference:.4g}: allowed are {tolerance:.4g}, and "
            f"half of the {effect:.4g} by which the adapter changes them. The merged model was not kept.",
            where=str(out),
            fix="Merge in float32.",
        )
    return MergeReport(out, num_layers, dtype, difference, tolerance, effect)


def _of_plain_weights(config: dict[str, Any]) -> dict[str, Any]:
    """What is written is not quantised, and `dtype`, called `torch_dtype` before Transformers 5, is its only dtype."""
    return {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}


def _refuse_occupied(out: Path) -> None:
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise OutputError("it exists and is not an empty folder.", where=str(out), fix="Name a new folder.")


def _stored_dtype(base: Path) -> torch.dtype:
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


def _random_tokens(spec: models.Spec) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocab_size, (_NUM_ROWS, min(_NUM_TOKENS, spec.max_positions)), generator=generator)


@torch.no_grad()
def _logits(model: models.Model, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


def _copy_files(base: Path, adapter_folder: Path, written: Path) -> None:
    """Copies what a model's folder holds besides weights and config.json: tokenizer, templates, licences."""
    for path in _companions(base):
        shutil.copyfile(path, written / path.name)
    if (adapter_folder / "tokenizer_config.json").is_file():
        for path in _companions(adapter_folder):
            shutil.copyfile(path, written / path.name)


def _companions(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.stem.lower().startswith(_COPIED_STEMS)
        written_anew = path.name in ("config.json", peft_config.FILE) or path.name.endswith(".index.json")
        if wanted and not written_anew and path.is_file():
            yield path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
