"""What the plan predicted beside what a run measured: memory by category and seconds of a step, for the report."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stoker.arch.borrowed import AnySpec
from stoker.config.schema import RunConfig
from stoker.plan import calibration, rates, speed, track_record
from stoker.plan.hardware import Device
from stoker.plan.memory import workspace_bytes
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from stoker.compose.trainer import Engine
    from stoker.models.open import Model

# Steps at the start that compile, warm up and fill caches, where as many are left.
_FIRST_STEPS = 3
_REST = "activations and all else"


def known_here(plan: Plan) -> list[str]:
    """Returns sentences on what the plan's figures rest on here: a calibration, and how far the last runs' were off."""
    one = calibration.load(plan.device_name)
    rested = [f"Time: {one.source}."] if one is not None else []
    quoted = track_record.quote(plan.device_name)
    return [*rested, *([quoted] if quoted else [])]


def memory(plan: Plan, decoder: "Model", engine: "Engine") -> dict[str, dict[str, int]]:
    """Returns predicted and measured bytes by category and in total.

    Weights are the tensors that this process holds on the device, the optimiser's those of its state on one device;
    the rest is what the peak has above them. A GPU's peak is what PyTorch allocated, so that CUDA's context and what
    the allocator loses are left out of its prediction; a CPU's is the process's resident memory.
    """
    engine.strategy.let_go()  # what was gathered is counted with the rest
    left_out = 0
    if plan.device == "cuda":
        import torch

        capability = torch.cuda.get_device_capability(engine.strategy.device)
        left_out = plan.memory.reserve - workspace_bytes(capability)
    total = {"predicted": plan.memory.total - left_out, "measured": engine.strategy.peak_memory_bytes()}
    found = {"weights": {"predicted": plan.memory.weights, "measured": _bytes(decoder, plan.device)}}
    if plan.num_processes == 1:
        held = sum(one.nbytes for one in engine.strategy.state().optimizer.values() if one.device.type == plan.device)
        found["optimizer"] = {"predicted": plan.memory.optimizer, "measured": held}
    rest = {name: total[name] - sum(one[name] for one in found.values()) for name in total}
    return {**found, _REST: rest, "total": total}


def _bytes(decoder: "Model", device: str) -> int:
    tensors: Iterable[torch.Tensor] = (*decoder.parameters(), *decoder.buffers())
    local = [getattr(one, "_local_tensor", one) for one in tensors]  # of a DTensor, this rank's part
    # Tied tensors, and those that lie in one buffer, count once.
    storages = [one.untyped_storage() for one in local if one.device.type == device]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def step_seconds(
    config: RunConfig,
    spec: AnySpec,
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    lengths: Iterable[int],
    *,
    rows_a_step: int | None = None,
) -> dict[str, float]:
    """Returns the predicted and the median measured seconds of a step; nothing for a run too short to tell.

    What was predicted is for rows as they came: `records` (of metrics.jsonl) say how full they were, `lengths` how long
    documents are. `config` has the rows of one process; `rows_a_step`: those of all, which `records` count (None: there
    is one).
    """
    steps = [one for one in records if "loss" in one and "padding_share" in one and one["num_tokens"]]
    steps = steps[_FIRST_STEPS:] if len(steps) > 2 * _FIRST_STEPS else steps[1:]
    if not steps:
        return {}
    tokens = sum(one["num_tokens"] for one in steps)
    positions = sum(one["num_tokens"] / (1.0 - one["padding_share"]) for one in steps)
    trained = sum(one["num_trained_tokens"] for one in steps)
    rows = (rows_a_step or config.train.batch_size) * len(steps)
    each = [int(one) for one in lengths]
    felt = sum(one * one for one in each) / sum(each) if sum(each) else tokens / rows
    work = speed.Rows(positions / rows / plan.sharing, min(felt, positions / rows), trained / positions)
    machine = Device(plan.device, plan.device_name, plan.available_bytes)  # pyrefly: ignore
    known = rates.of(machine, num_threads=plan.num_threads)
    predicted = speed.step(config, spec, plan, known.device, rows=work, efficiencies=known.efficiencies).seconds
    return {"predicted": predicted, "measured": statistics.median(one["seconds"] for one in steps)}


def remember(
    config: RunConfig, plan: Plan, found: Mapping[str, Mapping[str, int]], seconds: Mapping[str, float]
) -> str:
    """Adds a run's outcome to the machine's track record and returns it in a sentence; "" without a step's time."""
    if not seconds:
        return ""
    method = "full" if config.adapter is None else config.adapter.kind
    if plan.quantization != "none":
        method += f" on {plan.quantization}"
    if plan.num_processes > 1:
        method += f", {plan.strategy} over {plan.num_processes}"
    total = found["total"]
    one = track_record.Outcome(
        device=plan.device_name,
        model=config.model.base,
        method=method,
        predicted_bytes=total["predicted"],
        measured_bytes=total["measured"],
        predicted_seconds=seconds["predicted"],
        measured_seconds=seconds["measured"],
    )
    try:
        track_record.add(one)
    except OSError as error:
        kept = f"not kept: {error.strerror}"
    else:
        kept = f"kept in {track_record.path()}"
    return f"Predicted over measured: memory {one.memory_error:+.1%}, time of a step {one.time_error:+.0%} ({kept})."
