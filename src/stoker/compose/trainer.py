"""From a configuration, a plan, a model and documents to a `Trainer`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.compose import trained, updates
from stoker.compose.data import Data, loader
from stoker.compose.relief import Layers, relief
from stoker.compose.run_folder import RunFolder
from stoker.compose.streams import stream_loader
from stoker.config.schema import Adapter, Optimizer, RunConfig, WarmupStableDecay
from stoker.data.loader import Documents, StepLoader
from stoker.data.stream_loader import StreamLoader
from stoker.errors import ConfigError
from stoker.observe.observer import Observer
from stoker.optim import optimizers, schedules
from stoker.optim.groups import RateScale
from stoker.plan.plan import Plan
from stoker.tasks.supervised import SupervisedTask
from stoker.train.loop import Trainer
from stoker.train.settings import Checkpoints, EarlyStopping, Every, LossLimit, Settings

if TYPE_CHECKING:
    import torch

    from stoker.adapters.lora import Awaited
    from stoker.data.batch import Batch
    from stoker.distributed.ranks import Ranks
    from stoker.distributed.strategy import Strategy
    from stoker.models.open import Model
    from stoker.models.streamed import StreamedDecoder


@dataclass(frozen=True)
class Engine:
    """What runs the steps: the strategy with the task prepared in it, and the batches."""

    strategy: "Strategy"
    train: StepLoader | StreamLoader
    validation: StepLoader | None
    total_steps: int
    num_groups: int = 1
    """Processes, or groups of them that share rows, that a step's rows are dealt out to."""
    relieve: Callable[[], str] = lambda: ""
    """Lets layers keep less when a single document is too much, and says so; "" where nothing is left to try."""

    def close(self) -> None:
        """Ends what prepares rows beside the training."""
        if isinstance(self.train, StreamLoader):
            self.train.close()

    def validation_batches(self) -> "Iterable[Batch]":
        """Yields the held-out rows in order."""
        return self.validation.all() if self.validation is not None else ()


def compute_dtype(plan: Plan) -> "torch.dtype":
    """Returns the number format of the plan's matrix products."""
    import torch

    from stoker.distributed.single import PRECISIONS

    return PRECISIONS[plan.precision] or torch.float32


def weight_dtype(config: RunConfig, plan: Plan) -> "torch.dtype":
    """Returns what the model's own weights are kept in: frozen ones in the compute type, trained ones as configured."""
    import torch

    if config.adapter is not None:
        return compute_dtype(plan)
    return torch.bfloat16 if config.train.weight_dtype == "bf16" else torch.float32


def widen_vectors(decoder: "Model") -> None:
    """Keeps norms' weights and biases in fp32 where the matrices are bf16.

    They are a ten-thousandth of the weights. Each is in every token's way, and a norm's lie near 1, where bf16 numbers
    are 2^-8 apart: steps of 1e-5 would become rare jumps 400 times as large.
    """
    for parameter in decoder.parameters():
        if parameter.ndim < 2:
            parameter.data = parameter.data.float()


def add_adapter(decoder: "Model", adapter: Adapter, *, seed: int, awaited: "Awaited | None" = None) -> None:
    """Puts a new adapter, or the one of `adapter.start_from`, on the model and freezes the rest.

    `awaited`: of a model whose weights are still to come.

    Raises:
        ConfigError: the adapter to start from has other settings.
    """
    from stoker.adapters.lora import add_lora

    if adapter.start_from is not None:
        _go_on_from(decoder, adapter, Path(adapter.start_from).expanduser(), awaited)
        return
    add_lora(
        decoder,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets if isinstance(adapter.targets, str) else tuple(adapter.targets),
        dropout=adapter.dropout,
        rank_stabilized=adapter.rank_stabilized,
        dora=adapter.kind == "dora",
        seed=seed,
        awaited=awaited,
    )


def _go_on_from(decoder: "Model", adapter: Adapter, folder: Path, awaited: "Awaited | None") -> None:
    from dataclasses import replace

    from stoker.adapters.lora import lora_layers
    from stoker.export import adapter as folders

    folders.load(decoder, folder, awaited=awaited)
    layers = list(lora_layers(decoder))
    found = layers[0].settings
    pairs = {
        "rank": (adapter.rank, found.rank),
        "alpha": (adapter.alpha, found.alpha),
        "rank_stabilized": (adapter.rank_stabilized, found.rank_stabilized),
        "kind": (adapter.kind, "dora" if found.dora else "lora"),
    }
    for name, (asked, there) in pairs.items():
        if asked != there:
            raise ConfigError(
                f"adapter.{name} = {asked}, but the adapter in {folder} has {there}.", fix=f"Set it to {there}."
            )
    for layer in layers:
        layer.settings = replace(layer.settings, dropout=adapter.dropout)


def make_engine(
    config: RunConfig,
    plan: Plan,
    decoder: "Model",
    data: Data,
    *,
    pad_id: int,
    ranks: "Ranks | None" = None,
    streamed: "StreamedDecoder | None" = None,
) -> Engine:
    """Wraps the model in its task, prepares the strategy and cuts the documents into steps, of which `ranks` share.

    `streamed` gives a decoder on the meta device its weights.
    """
    from stoker.compose.execution import limit_memory, set_up_weights
    from stoker.compose.parallel import make_strategy, share_rows

    limit_memory(plan, config.engine.memory_limit_gib)
    set_up_weights(decoder, plan)
    if config.adapter is None:
        widen_vectors(decoder)
    sharing = share_rows(config, decoder, ranks)
    layers = Layers(decoder, plan)
    fill = None if streamed is None else streamed.fill
    strategy = make_strategy(config, plan, decoder, ranks, on_discard=(layers.clear,), fill=fill)
    strategy.prepare(
        SupervisedTask(decoder, kernels=plan.kernels),
        lambda named: make_optimizer(
            named,
            config.train.optimizer,
            config.train.learning_rate,
            rate_scale=trained.rate_scale(config.train),
            **_steps(config, plan, strategy.part),
        ),
    )

    def batches(documents: Documents, *, mixed: bool = False) -> StepLoader:
        return loader(
            config,
            documents,
            micro_batch_size=plan.micro_batch_size,
            pad_id=pad_id,
            mixed=mixed,
            rank=sharing.number,
            world_size=sharing.num_groups,
            part=sharing.index,
            num_parts=sharing.size,
        )

    train: StepLoader | StreamLoader = batches(data.train, mixed=data.windows is None)
    if data.windows is not None:
        train = stream_loader(
            config,
            data.windows,
            micro_batch_size=plan.micro_batch_size,
            pad_id=pad_id,
            first=list(train.all()),
            ranks=ranks,
            rank=sharing.number,
            world_size=sharing.num_groups,
            part=sharing.index,
            num_parts=sharing.size,
        )
    validation = batches(data.validation) if data.validation is not None else None
    steps = total_steps(config, train.steps_per_epoch)
    return Engine(strategy, train, validation, steps, sharing.num_groups, relief(config, layers))


def total_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Returns the optimiser steps of the run: `train.steps`, or the epochs rounded up to whole steps."""
    if config.train.steps is not None:
        return config.train.steps
    epochs = config.train.epochs or 1.0
    # Rounded first: 0.1 * 30 epochs of 10 steps must not become 31 steps through a last binary digit.
    return max(1, math.ceil(round(epochs * steps_per_epoch, 6)))


def make_optimizer(
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    chosen: Optimizer,
    learning_rate: float,
    *,
    rate_scale: RateScale | None = None,
    **steps: Any,
) -> "torch.optim.Optimizer":
    """Returns the optimiser that the configuration names, over `named_parameters`; `steps`: how it steps."""
    return optimizers.build(
        list(named_parameters), learning_rate=learning_rate, rate_scale=rate_scale, **steps, **chosen.model_dump()
    )


def _steps(config: RunConfig, plan: Plan, part: int) -> dict[str, Any]:
    """Returns how the optimiser steps, as options of `optimizers.build`.

    Weights in bf16 are rounded stochastically. Adapters beside graphs are stepped all at once: launching a step over
    each of them would take longer than the step. (All weights of a model would be held twice on the way there.)
    """
    if config.train.weight_dtype == "bf16" and config.adapter is None:
        return {"rounded_update": updates.adamw(plan.kernels, seed=config.train.seed, part=part)}
    if config.train.optimizer.kind == "adamw_8bit":
        return {"eight_bit": updates.eight_bit(plan.kernels)}
    if config.train.optimizer.kind == "adamw" and config.adapter is not None and plan.cuda_graphs:
        return {"flat": True, "flat_update": updates.adamw(plan.kernels) if plan.kernels == "triton" else None}
    return {}


def make_schedule(config: RunConfig, steps: int) -> schedules.Schedule:
    """Returns the schedule of a run of `steps`, with ratios turned into steps."""
    chosen = config.train.schedule
    warmup = chosen.warmup_steps
    if warmup is None:
        warmup = math.ceil((chosen.warmup_ratio or 0.0) * steps)
    decay = math.ceil(chosen.decay_ratio * steps) if isinstance(chosen, WarmupStableDecay) else None
    floor = getattr(chosen, "floor", 0.0)
    return schedules.build(chosen.kind, steps, warmup_steps=min(warmup, steps), floor=floor, decay_steps=decay)


def make_trainer(
    config: RunConfig,
    engine: Engine,
    folder: RunFolder,
    *,
    observers: Sequence[Observer],
    description: Mapping[str, str] | None = None,
    warm_up_reason: str = "",
    at: Callable[[str, int], None] = lambda phase, finished: None,
) -> Trainer:
    """Returns the trainer of a run, which saves its checkpoints in `folder` and tells `at` what it does."""
    train, output = config.train, config.output
    stopping = train.early_stopping
    settings = Settings(
        total_steps=engine.total_steps,
        learning_rate=train.learning_rate,
        schedule=make_schedule(config, engine.total_steps),
        max_gradient_norm=train.max_gradient_norm,
        evaluate=Every(train.evaluate_every_steps, train.evaluate_every_epochs),
        early_stopping=EarlyStopping(stopping.patience, stopping.min_improvement) if stopping else None,
        loss_limit=LossLimit(train.loss_limit.above, train.loss_limit.patience) if train.loss_limit else None,
        log_every_steps=train.log_every_steps,
        warm_up_reason=warm_up_reason,
    )
    return Trainer(
        engine.strategy,
        engine.train,
        settings=settings,
        validation=engine.validation_batches if engine.validation is not None else None,
        checkpoints=Checkpoints(
            folder.checkpoints,
            Every(output.save_every_steps, output.save_every_epochs),
            keep_last=output.keep_last,
            keep_best=output.keep_best,
            background=None if output.save_in_background == "auto" else output.save_in_background,
        ),
        observers=observers,
        description=description,
        relieve=engine.relieve,
        at=at,
    )


def describe(config: RunConfig) -> str:
    """Returns what the run does in a few words: "LoRA of rank 16 on builtin:tiny-llama"."""
    adapter: Any = config.adapter
    if adapter is None:
        return f"full fine-tuning of {config.model.base}"
    name = {"lora": "rsLoRA" if adapter.rank_stabilized else "LoRA", "dora": "DoRA"}[adapter.kind]
    quantization = config.model.quantization
    base = config.model.base if quantization == "none" else f"{config.model.base} in {quantization}"
    return f"{name} of rank {adapter.rank} on {base}"
