"""Which processes a run has, what the plan of one of them becomes, and the strategy over them."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from stoker.arch.spec import ArchSpec
from stoker.compose.run_folder import RunFolder, versions
from stoker.config import deepspeed
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError, PlanError
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from stoker.compose.model import Base
    from stoker.distributed.fsdp2 import Fill, Sharding
    from stoker.distributed.ranks import Place, Ranks
    from stoker.distributed.shared_rows import Sharing
    from stoker.distributed.strategy import Strategy
    from stoker.models.open import Model
    from stoker.models.streamed import StreamedDecoder


def find_place() -> "Place | None":
    """Returns this process's place among those that a launcher has started; None where it is on its own."""
    from stoker.distributed import ranks

    return ranks.find_place(os.environ)


def join(config: RunConfig) -> "Ranks":
    """Joins the processes of the run.

    Raises:
        ConfigError: the configuration wants others than there are.
    """
    import torch

    from stoker.distributed import ranks
    from stoker.distributed.watchdog import record_collectives

    place, engine = find_place(), config.engine
    size = 1 if place is None else place.world_size
    if place is None and (engine.num_processes or 1) > 1:
        raise ConfigError(
            f"engine.num_processes = {engine.num_processes}, but this is one process.",
            fix="Start the run with `stoker train`, which starts the others, or with torchrun.",
        )
    if engine.strategy == "single" and size > 1:
        raise ConfigError(f"engine.strategy = single, but {size} processes were started.", fix="Use auto, or one.")
    uses_gpu = engine.device == "cuda" or (engine.device == "auto" and torch.cuda.is_available())
    if uses_gpu and place is not None and place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {place.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}.",
            fix="Start as many processes as there are GPUs (--gpus).",
        )
    if uses_gpu and size > 1:
        record_collectives(RunFolder.of(config.output.folder).path / "nccl-rank-")
    # The watchdog comes first: it says who hangs, which a collective that gives up does not.
    timeout = max(ranks.TIMEOUT, 2 * timedelta(seconds=engine.hang_timeout))
    if engine.strategy == "deepspeed":
        require_deepspeed()
        require_disk(config, place, kind="cuda" if uses_gpu else "cpu")
    group = engine.strategy in ("ddp", "fsdp2", "deepspeed")
    return ranks.join(place, kind="cuda" if uses_gpu else "cpu", group=group, timeout=timeout)


def require_deepspeed() -> None:
    """Raises PlanError, with how to install it, where DeepSpeed is not there."""
    if importlib.util.find_spec("deepspeed") is None:
        raise PlanError(
            "engine.strategy = deepspeed needs DeepSpeed, which is not installed.",
            fix="Install it with: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed, or use fsdp2.",
        )


def require_disk(config: RunConfig, place: "Place | None", *, kind: str) -> None:
    """Raises PlanError where something is to go to NVMe and cannot, before data and weights are read; see there."""
    if "nvme" not in deepspeed.offload(config.engine.deepspeed):
        return
    from stoker.distributed import deepspeed as zero

    zero.require_disk(zero.package(kind, place), deepspeed.settings(config.engine.deepspeed, hidden_size=None))


def require_same(ranks: "Ranks", config: RunConfig) -> None:
    """Refuses to begin where processes differ in versions or configuration; raises TrainingError, which names them."""
    found = {f"the version of {name}": version for name, version in versions().items() if name != "platform"}
    ranks.require_same({**found, **dict(_settings(config.model_dump(mode="json")))})


def _settings(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each setting of a configuration by its name: train.learning_rate."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{section}{name}.")
        else:
            yield f"{section}{name}", value


def share_of_one(config: RunConfig, world_size: int) -> RunConfig:
    """Returns the configuration as one of the processes sees it: with its part of a step's rows, and of their length.

    Raises:
        PlanError: the rows cannot be dealt out evenly.
    """
    batch_size, asked = config.train.batch_size, config.engine.micro_batch_size
    sharing = config.engine.context_parallel
    if world_size % sharing:
        raise PlanError(
            f"engine.context_parallel = {sharing} does not divide {_processes(world_size)}.",
            fix=f"Start a multiple of {sharing} of them (--gpus), or leave it out.",
        )
    groups = world_size // sharing
    to = f"{world_size} processes" if sharing == 1 else f"{groups} groups of {sharing} processes"
    if batch_size % groups:
        raise PlanError(
            f"train.batch_size = {batch_size} sequences a step cannot be dealt out to {to}.",
            fix=f"Use a multiple of {groups}.",
        )
    mine = batch_size // groups
    if asked != "auto" and mine % asked:
        raise PlanError(
            f"engine.micro_batch_size = {asked} does not divide the {mine} sequences that each of {to} has of a step.",
            fix="Use auto, or a divisor.",
        )
    changes: dict[str, Any] = {"train": config.train.model_copy(update={"batch_size": mine})}
    if sharing > 1:
        length = -(-config.data.sequence_length // sharing)
        changes["data"] = config.data.model_copy(update={"sequence_length": length})
    return config.model_copy(update=changes)


def processes_here(world_size: int) -> int:
    """Returns how many of the run's processes are on this machine."""
    told = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", ""))
    digits = re.match(r"\d+", told)  # Slurm writes "8(x2)" for two machines
    return min(world_size, int(digits[0])) if digits else world_size


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def spread(plan: Plan, config: RunConfig, world_size: int) -> Plan:
    """Returns the plan of one of the processes with what it cannot have beside others, and says what they share.

    Raises:
        PlanError: what was asked for does not run over processes.
    """
    asked, strategy = config.engine.strategy, plan.strategy
    if strategy == "single":
        return plan
    if config.engine.cuda_graphs is True:
        raise PlanError(f"engine.cuda_graphs = true is for one process; the strategy is {strategy}.", fix="Use auto.")
    steps = deepspeed.accumulation_steps(config.engine.deepspeed) if strategy == "deepspeed" else None
    if steps not in (None, plan.accumulation_steps):
        raise PlanError(
            f"engine.deepspeed.config: gradient_accumulation_steps says {steps}, but {plan.accumulation_steps} "
            f"micro-batches of {plan.micro_batch_size} are what each of {world_size} processes has of "
            "train.batch_size.",
            fix="Write auto there.",
        )
    if strategy == "fsdp2" and world_size % config.engine.fsdp2.replicas:
        raise PlanError(
            f"engine.fsdp2.replicas = {config.engine.fsdp2.replicas} does not divide the {world_size} processes.",
            fix="Use as many groups as machines.",
        )
    if world_size == 1:
        return plan  # which says what the strategy does for one process
    holds = "a part of each weight" if plan.spread.weight_shards > 1 else "the whole model"
    if strategy == "deepspeed":
        holds = f"{holds} (ZeRO-{plan.stage})"
    reason = f"{world_size} processes, each with {holds}"
    if config.engine.context_parallel > 1:
        reason += f"; {config.engine.context_parallel} share each row, and memory is that of a part"
    reasons = {"strategy": reason if asked == "auto" else f"set in the configuration: {reason}"}
    reasons["cuda_graphs"] = "graphs are for one process"
    return replace(
        plan,
        cuda_graphs=False,
        reasons={**plan.reasons, **reasons},
    )


def share_rows(config: RunConfig, decoder: "Model", ranks: "Ranks | None") -> "Sharing":
    """Lets `decoder` compute this process's part of rows, as configured; returns which part of whose rows it is."""
    from stoker.distributed import shared_rows
    from stoker.distributed.ranks import Ranks
    from stoker.kernels.head_exchange import HeadExchange
    from stoker.nn import shared_rows as models
    from stoker.nn.decoder import Decoder

    sharing = shared_rows.share(ranks or Ranks(), config.engine.context_parallel)
    if isinstance(decoder, Decoder):
        alone = sharing.size == 1
        exchange = None if alone else HeadExchange(sharing.group, index=sharing.index, size=sharing.size)
        if exchange is not None or decoder.exchange is not None:
            models.share_rows(decoder, exchange)
    return sharing


def make_strategy(
    config: RunConfig,
    plan: Plan,
    decoder: "Model",
    ranks: "Ranks | None",
    *,
    on_discard: Sequence[Callable[[], None]] = (),
    fill: "Fill | None" = None,
) -> "Strategy":
    """Returns the plan's strategy over `ranks`; `fill` gives a model on the meta device its weights."""
    import torch

    from stoker.distributed.ddp import DataParallel
    from stoker.distributed.fsdp2 import Sharded
    from stoker.distributed.ranks import Ranks
    from stoker.distributed.single import SingleDevice
    from stoker.kernels.ahead import can_compile_ahead, compiling_ahead

    if plan.strategy == "single":
        rehearses = plan.kernels == "triton" and plan.device == "cuda" and can_compile_ahead()
        return SingleDevice(
            plan.device,
            precision=plan.precision,
            on_discard=on_discard,
            # What the user asks for is done or fails; what the plan chose may turn out to be impossible.
            cuda_graphs="auto" if plan.cuda_graphs and config.engine.cuda_graphs == "auto" else plan.cuda_graphs,
            rehearsing=compiling_ahead if rehearses else None,
        )
    ranks = ranks or Ranks()
    device = f"cuda:{torch.cuda.current_device()}" if plan.device == "cuda" else plan.device
    if plan.strategy == "ddp":
        shares_rows = config.engine.context_parallel > 1
        return DataParallel(
            ranks, device, precision=plan.precision, on_discard=on_discard, splits_alone=not shares_rows
        )
    options: dict[str, Any] = {"precision": plan.precision, "on_discard": on_discard, "fill": fill}
    options |= {"model": decoder, "layers": list(decoder.blocks)}
    if plan.strategy == "deepspeed":
        from stoker.distributed.deepspeed import Zero

        width = None if decoder.head_weight is None else decoder.head_weight.shape[1]
        return Zero(ranks, device, settings=deepspeed.settings(config.engine.deepspeed, hidden_size=width), **options)
    return Sharded(ranks, device, sharding=_sharding(config, plan), **options)


def _sharding(config: RunConfig, plan: Plan) -> "Sharding":
    import torch

    from stoker.distributed.fsdp2 import Sharding

    chosen = config.engine.fsdp2
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
    return Sharding(
        reshard_after_forward=plan.spread.reshards is not False,
        replicas=chosen.replicas,
        cpu_offload=chosen.offload == "cpu",
        param_dtype=dtypes[chosen.param_dtype],
        reduce_dtype=dtypes[chosen.reduce_dtype] or torch.float32,
    )


def shares_weights(plan: Plan) -> bool:
    """Whether each process keeps a part of every weight."""
    return plan.strategy == "fsdp2" or plan.stage == 3


def why_not_streamed(base: "Base") -> str:
    """Returns why each process must read the whole model before it keeps its part; "" where it need not."""
    if not isinstance(base.spec, ArchSpec):
        return f"Transformers' {base.spec.class_name} loads its weights itself"
    return ""


def stream(config: RunConfig, plan: Plan, base: "Base", ranks: "Ranks", *, dtype: "torch.dtype") -> "StreamedDecoder":
    """Returns the base as a decoder without memory, and what streams its weights into the parts of each process."""
    from stoker.models.streamed import StreamedDecoder

    assert isinstance(base.spec, ArchSpec)
    return StreamedDecoder(
        base.folder,
        base.spec,
        device=plan.device,
        dtype=dtype,
        kernels=plan.kernels,
        quantization=plan.quantization,
        rank=ranks.rank,
        world_size=ranks.world_size,
        gather=ranks.gather,
    )
