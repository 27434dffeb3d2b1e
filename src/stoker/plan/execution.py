"""Which kernels run, how the layers run, and whether this machine has what the configuration asks for."""

from typing import Literal

from stoker.arch import activations
from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import (
    AttentionSpec,
    DynamicScaling,
    LatentAttentionSpec,
    LongRopeScaling,
    MixerSpec,
    SideBySideSpec,
)
from stoker.config.schema import RunConfig
from stoker.errors import PlanError
from stoker.plan.hardware import Device
from stoker.plan.remember import remember
from stoker.plan.spread import Spread

Kernels = Literal["reference", "triton"]
# Triton compiles for GPUs from Volta on, flash attention for Ampere; PyTorch's fp8 products need Ada's or Hopper's
# tensor cores.
_TRITON_CAPABILITY = (7, 0)
_FP8_CAPABILITY, _FP8_SIZES = (8, 9), 16
_FLASH_CAPABILITY = (8, 0)
LAUNCH_BOUND_FLOPS = {"fused": 4e11, "op by op": 5e12}
"""FLOPs of a layer's forward and backward below which launching its kernels takes longer than running them.

By measurement beside an H200 a fused layer takes some 0.6 ms to launch, one that runs op by op 5 (Mamba-2) to 13 ms (a
mixture of experts). Slower GPUs are bound by their work at fewer FLOPs; there a graph gains nothing and costs nothing.
"""
GAP_SECONDS = 0.38e-3
"""Of a fused layer's forward and backward, in which the GPU waits between kernels that are launched one by one: 6 ms of
184 with 16 layers, on an H200."""
GAPS_MATTER = 0.04
"""Share of the work from which on gaps are worth a graph: at 0.047 it gained 3% (a 1B in bf16), at 0.042 1.2% (an 8B in
fp8), at 0.030 nothing (an 8B in bf16)."""
FP8_SPEED = 1.4
"""How many times as fast a layer of an 8B is whose base is in fp8, beside bf16: 357 of 497 ms, on an H200."""
_FORMATS = {
    "nf4": "the base in NF4, 4.1 bits a weight",
    "int8": "the base in int8, one scale a row",
    "fp8": "the base in fp8",
}


def kernels(config: RunConfig, device: Device) -> tuple[Kernels, str]:
    """Returns which implementation of each operation runs, and why.

    Raises PlanError when Triton's kernels are asked for where they cannot run.
    """
    asked = config.engine.kernels
    missing = _why_no_triton(device)
    if asked == "triton" and missing:
        raise PlanError(f"engine.kernels = triton: {missing}.", fix="Use reference, or auto.")
    if asked != "auto":
        return asked, "set in the configuration"
    # Under Triton's interpreter kernels run on a CPU too, for tests alone: it is a thousand times slower.
    if device.kind == "cuda" and not missing:
        return "triton", "fused kernels on a CUDA GPU"
    return "reference", f"plain PyTorch: {missing or 'Triton is slower on a CPU'}"


def _why_no_triton(device: Device) -> str:
    if device.triton:
        return ""
    if device.kind != "cuda":
        return f"Triton's kernels need a CUDA GPU, and this is {'a CPU' if device.kind == 'cpu' else 'an Apple GPU'}"
    capability = device.compute_capability
    if capability is not None and capability < _TRITON_CAPABILITY:
        return f"Triton needs compute capability 7.0 or later, and {device.name} has {_dotted(capability)}"
    return "Triton is not installed (pip install triton)"


def quantization(config: RunConfig, device: Device) -> tuple[str, str]:
    """Returns the format of the frozen base, and why; raises PlanError when the device cannot compute with it."""
    kind = config.model.quantization
    if kind == "none":
        return kind, "weights as the compute type has them"
    if kind != "fp8":
        return kind, _FORMATS[kind]
    capability = device.compute_capability
    if device.kind == "cpu":
        return kind, f"{_FORMATS[kind]}; a CPU computes the same values in fp32, which is slow"
    if device.kind != "cuda" or capability is None or capability < _FP8_CAPABILITY:
        has = f"{device.name} has {_dotted(capability)}" if capability else f"{device.name} has none"
        raise PlanError(
            f"model.quantization = fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper); {has}.",
            fix="Use int8, which takes the same memory, or nf4, which takes half.",
        )
    return kind, f"{_FORMATS[kind]}, and products in fp8, which {device.name} has"


def why_no_fp8_head(spec: AnySpec, device: Device, spread: Spread) -> str:
    """Returns what keeps the products of a frozen head out of fp8 where layers' run in it, or ""."""
    if device.kind != "cuda":
        return "without hardware for it there is nothing to gain"
    if isinstance(spec, BorrowedSpec):
        return "a borrowed class has its own head"
    if spread.strategy not in ("single", "ddp"):
        return f"{spread.strategy} shares its weight"
    if spec.vocab_size % _FP8_SIZES or spec.hidden_size % _FP8_SIZES:
        return f"fp8 products take sizes that {_FP8_SIZES} divides, not {spec.vocab_size:,} x {spec.hidden_size:,}"
    return ""


def why_no_graphs(
    config: RunConfig, spec: AnySpec, device: Device, *, precision: str, uses_triton: bool, offload: bool
) -> str:
    """Returns what keeps micro-batches from being captured as CUDA graphs, or ""."""
    if device.kind != "cuda":
        return "only a CUDA GPU captures launches"
    if isinstance(spec, BorrowedSpec):
        return "what a borrowed model runs is not known to be the same each time"
    hindrances = {
        "dropout draws a seed for each micro-batch": config.adapter is not None and config.adapter.dropout > 0.0,
        "noise is drawn for each micro-batch": config.train.embedding_noise is not None,
        "a mixture's balancing loss counts each micro-batch's tokens": _balances(spec),
        "kept activations wait on the host": offload,
    }
    hindrance = next((what for what, there in hindrances.items() if there), "")
    if hindrance or not config.data.packing:
        return hindrance
    found = (_why_by_document(config, layer.mixer, device, precision, uses_triton=uses_triton) for layer in spec.layers)
    return next(
        (f"packed rows run document by document: {why} (data.packing: false has none)" for why in found if why), ""
    )


def _why_by_document(
    config: RunConfig, mixer: MixerSpec | None, device: Device, precision: str, *, uses_triton: bool
) -> str:
    """Returns why a mixer's documents run one after the other, so that how many there are decides what runs; or ""."""
    attention = mixer.attention if isinstance(mixer, SideBySideSpec) else mixer
    if not isinstance(attention, AttentionSpec | LatentAttentionSpec):
        return ""
    scaling = None if attention.rope is None else attention.rope.scaling
    follows_length = isinstance(scaling, DynamicScaling | LongRopeScaling)
    if follows_length and config.data.sequence_length > scaling.original_max_positions:
        return "angles follow a document's length"
    if isinstance(attention, AttentionSpec) and (attention.softcap is not None or attention.sinks):
        return "" if uses_triton else "so does plain PyTorch with soft-capped scores or sinks"
    if precision not in ("bf16", "fp16"):
        return f"variable-length attention has no {precision}"
    capability = device.compute_capability
    if capability is not None and capability < _FLASH_CAPABILITY:
        return f"variable-length attention needs compute capability 8.0, and {device.name} has {_dotted(capability)}"
    return ""


def _balances(spec: AnySpec) -> bool:
    parts = [getattr(layer, "feed_forward", None) for layer in spec.layers]
    return any(getattr(part, "auxiliary_loss", 0.0) for part in parts)


@remember(0)
def why_op_by_op(spec: AnySpec) -> str:
    """Returns what keeps every layer from the layer kernel, or "" (see `adapters.fused_block.why_not_fused`)."""
    if isinstance(spec, BorrowedSpec):
        return f"they are {spec.origin}"
    reasons = [why_not_llama(layer) for layer in spec.layers]
    return f"this model has {reasons[0]}" if reasons and all(reasons) else ""


def refuse_unknown_rungs(config: RunConfig, spec: AnySpec | None, device: Device) -> None:
    """Raises PlanError for a rung of the ladder, or an offload, that does not exist for this model (None: any) or
    device."""
    engine, why = config.engine, "" if spec is None else why_op_by_op(spec)
    if spec is not None and why and engine.recompute in {"mixer", "attention"} - _op_by_op_rungs(spec):
        raise PlanError(
            f"engine.recompute = {engine.recompute} is a rung of the layer kernel, which cannot run here: {why}.",
            fix="Use none, input or auto.",
        )
    offload = f"engine.offload_activations = {str(engine.offload_activations).lower()}"
    if engine.offload_activations not in ("auto", False) and device.kind != "cuda":
        raise PlanError(f"{offload} needs a CUDA GPU; this run uses {device.name}.", fix="Use false or auto.")
    if engine.offload_activations not in ("auto", False) and why:
        raise PlanError(f"{offload} needs the layer kernel, which cannot run here: {why}.", fix="Use false or auto.")


def _op_by_op_rungs(spec: AnySpec) -> set[str]:
    layers = () if isinstance(spec, BorrowedSpec) else spec.layers
    return {rung for layer in layers for rung in activations.op_by_op_rungs(layer)}


def layers_reason(config: RunConfig, spec: AnySpec, layers: str, *, uses_triton: bool) -> str:
    """Returns why the layers run as they do."""
    if isinstance(spec, BorrowedSpec):
        why = spec.why.rstrip(".")
        rows = "" if config.data.packing or spec.packs else "; rows are not packed, as it keeps no documents apart"
        return f"through {spec.origin}: {why}{rows}; memory is a coarser estimate than for native models"
    if layers == "fused":
        reasons = [reason for layer in spec.layers if (reason := why_not_llama(layer))]
        if not reasons:
            return "each layer is one operation with its own backward"
        count = f"{len(reasons)} of {len(spec.layers)} layers"
        return f"a layer is one operation with its own backward, but {count} run op by op: they have {reasons[0]}"
    if why := why_op_by_op(spec):
        return f"the layer kernel cannot run these layers: {why}"
    assert not uses_triton
    return "fastest on plain PyTorch where nothing is computed again"


def _dotted(capability: tuple[int, int] | None) -> str:
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"
