"""How a run is spread over devices: which strategy, how many share what, and what passes between them in a step.

A collective over n ranks moves (n - 1) / n of a tensor into each of them for a gather or a scattered sum, and twice
that for a sum that all have (Rabenseifner 2004; Rajbhandari et al., arXiv:1910.02054, section 7).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from stoker.config import deepspeed
from stoker.config.schema import Engine, RunConfig

StrategyName = Literal["single", "ddp", "fsdp2", "deepspeed"]


@dataclass(frozen=True)
class Spread:
    """A strategy over `num_processes` devices, `per_node` of them in each node; `stage`: of ZeRO, 1 to 3.

    `replicas`: groups that share weights among themselves. `reshards`: a layer's weights are let go after its forward
    (None: unless there is the memory to keep them). `param_dtype`, `reduce_dtype`: those of `engine.fsdp2`.
    `on_host`: what of "weights", "gradients" and "optimizer" waits outside of the device, `on_disk` what of that waits
    on NVMe. `sharing`: devices that share each row. `bucket_values`: of gradients that DeepSpeed sums at once; None:
    the square of the model's width.
    """

    strategy: StrategyName = "single"
    num_processes: int = 1
    per_node: int = 1
    stage: int = 0
    replicas: int = 1
    reshards: bool | None = True
    on_host: frozenset[str] = frozenset()
    sharing: int = 1
    on_disk: frozenset[str] = frozenset()
    bucket_values: int | None = 5 * 10**8
    param_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def name(self) -> str:
        """For people: "ddp", "ZeRO-2"."""
        return f"ZeRO-{self.stage}" if self.strategy == "deepspeed" else self.strategy

    @property
    def groups(self) -> int:
        """How many groups of devices have rows of their own."""
        return self.num_processes // self.sharing

    @property
    def nodes(self) -> int:
        """How many nodes it takes."""
        return -(-self.num_processes // self.per_node)

    @property
    def weight_shards(self) -> int:
        """Ranks that share every weight, frozen ones among them."""
        if self.strategy == "fsdp2":
            return max(1, self.num_processes // self.replicas)
        return self.num_processes if self.stage == 3 else 1

    @property
    def copies_weights(self) -> bool:
        """Whether FSDP2 runs where every device has all weights: what it would gather for a layer's work it copies."""
        return self.strategy == "fsdp2" and self.weight_shards == 1

    @property
    def shares_frozen(self) -> bool:
        """Whether FSDP2 shares frozen weights too: where a device has all of them, they stay there as they are."""
        return self.weight_shards > 1 or "weights" in self.on_host

    @property
    def gathers(self) -> int:
        """How often a micro-batch gathers a layer."""
        return 1 if self.reshards is False else 2

    @property
    def gradient_shards(self) -> int:
        """Ranks that share every gradient."""
        return self.weight_shards if self.strategy == "fsdp2" else self.num_processes if self.stage >= 2 else 1

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the optimiser's state."""
        return self.weight_shards if self.strategy == "fsdp2" else self.num_processes if self.stage >= 1 else 1


SINGLE = Spread()
STRATEGIES = (("ddp", 0), ("fsdp2", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
"""Strategies over several devices with their stage."""


def spreads(
    num_processes: int, per_node: int, *, asked: str = "auto", stages: tuple[int, ...] = (1, 2, 3)
) -> list[Spread]:
    """Returns the ways to spread a run over so many devices; `asked` is engine.strategy."""
    if num_processes == 1 and asked in ("auto", "single"):
        return [SINGLE]
    return [
        Spread(strategy, num_processes, min(per_node, num_processes), stage)  # type: ignore[arg-type]
        for strategy, stage in STRATEGIES
        if asked in ("auto", strategy) and (not stage or stage in stages)
    ]


def configured(spread: Spread, config: RunConfig) -> Spread:
    """Returns the same with what the configuration says of its strategy: replicas, resharding, offload, shared rows."""
    engine = config.engine
    spread = replace(spread, sharing=engine.context_parallel)
    if spread.strategy == "fsdp2":
        chosen = engine.fsdp2
        everything = frozenset(("weights", "gradients", "optimizer")) if chosen.offload == "cpu" else frozenset()
        reshards = None if chosen.reshard_after_forward == "auto" else chosen.reshard_after_forward
        replicas = chosen.replicas if spread.num_processes % chosen.replicas == 0 else 1
        return replace(
            spread,
            replicas=replicas,
            reshards=reshards,
            on_host=everything,
            param_dtype=chosen.param_dtype,
            reduce_dtype=chosen.reduce_dtype,
        )
    if spread.strategy == "deepspeed":
        optimizer, weights = deepspeed.offload(engine.deepspeed)
        # Reduced gradients go where the optimiser's state is (ZeRO-Offload, arXiv:2101.06840).
        gradients = optimizer if spread.stage >= 2 else "none"
        places = {"optimizer": optimizer, "gradients": gradients, "weights": weights}
        away = frozenset(name for name, place in places.items() if place in ("cpu", "nvme"))
        on_disk = frozenset(name for name in away if places[name] == "nvme")
        bucket = deepspeed.bucket_values(engine.deepspeed)
        return replace(spread, on_host=away, on_disk=on_disk, bucket_values=bucket)
    return spread


def beyond_sharing(engine: Engine) -> list[str]:
    """Returns the settings by which the strategy that was asked for does more than share, as "engine.x = value".

    FSDP2 does where weights wait on the host or are used in a format of their own, DeepSpeed where states wait
    elsewhere or its own JSON sets more.
    """
    match engine.strategy:
        case "fsdp2":
            section, usual = engine.fsdp2, {"offload": ("none",), "param_dtype": ("auto",), "reduce_dtype": ("fp32",)}
        case "deepspeed":
            places = ("auto", "none")
            section = engine.deepspeed
            usual = {"config": (None,), "offload_optimizer": places, "offload_parameters": places}
        case _:
            return []
    values = {name: getattr(section, name) for name in usual}
    name = engine.strategy
    return [
        f"engine.{name}.{key}" if isinstance(value, dict) else f"engine.{name}.{key} = {value}"
        for key, value in values.items()
        if value not in usual[key]
    ]


def share(config: RunConfig, spread: Spread) -> RunConfig:
    """Returns the configuration as one of the processes sees it, which has its part of a step's rows, or of their
    length.

    Raises:
        ValueError: they cannot be dealt out evenly.
    """
    sharing = config.engine.context_parallel
    if spread.num_processes % sharing:
        devices = "one device" if spread.num_processes == 1 else f"{spread.num_processes} devices"
        raise ValueError(f"engine.context_parallel = {sharing} does not divide {devices}")
    groups = spread.num_processes // sharing
    rows, rest = divmod(config.train.batch_size, groups)
    if rest or not rows:
        to = f"{groups} devices" if sharing == 1 else f"{groups} groups of {sharing} devices"
        raise ValueError(f"train.batch_size = {config.train.batch_size} cannot be dealt out to {to}")
    micro = config.engine.micro_batch_size
    if micro != "auto" and rows % micro:
        each = f"the {rows} sequences a step of each of" if rows > 1 else "the one sequence a step of each of"
        raise ValueError(f"engine.micro_batch_size = {micro} does not divide {each} {spread.num_processes} devices")
    changes: dict[str, Any] = {"train": config.train.model_copy(update={"batch_size": rows})}
    if sharing > 1:
        length = -(-config.data.sequence_length // sharing)
        changes["data"] = config.data.model_copy(update={"sequence_length": length})
    return config.model_copy(update=changes)


@dataclass(frozen=True)
class Volume:
    """Bytes of the tensors that pass between ranks: in each micro-batch, and once a step."""

    micro_gathered: float = 0.0
    micro_summed: float = 0.0
    step_gathered: float = 0.0
    step_summed: float = 0.0
    step_all_summed: float = 0.0

    def per_step(self, micro_batches: int, ranks: int) -> float:
        """Returns the bytes that come into one device in a step."""
        once = self.step_gathered + self.step_summed + 2 * self.step_all_summed
        return (micro_batches * (self.micro_gathered + self.micro_summed) + once) * (ranks - 1) / ranks


def volume(spread: Spread, *, stored: float, gradients: float, outside: float = 0.0) -> Volume:
    """Returns what passes in a step. `stored`: bytes of all weights as they pass, `outside`: of those that are in no
    layer; `gradients`: bytes of all of those.

    DDP sums gradients once. FSDP2 and ZeRO-3 gather every weight for the forward and again for the backward of
    each micro-batch (FSDP2 those that are in no layer once) and sum its gradients into parts; ZeRO-2 sums them so too,
    and gathers the new weights once; ZeRO-1 sums once into parts.
    """
    match spread.name:
        case "ddp":
            return Volume(step_all_summed=gradients)
        case "fsdp2":
            return Volume(micro_gathered=spread.gathers * (stored - outside) + outside, micro_summed=gradients)
        case "ZeRO-1":
            return Volume(step_summed=gradients, step_gathered=gradients)
        case "ZeRO-2":
            return Volume(micro_summed=gradients, step_gathered=gradients)
        case "ZeRO-3":
            return Volume(micro_gathered=2 * stored, micro_summed=gradients)
    return Volume()
