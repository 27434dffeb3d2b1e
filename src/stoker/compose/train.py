"""`stoker train`, whole: from a configuration to a tuned model, its report and a word on what to do next."""

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import stoker
from stoker.checkpoint.read import load as read
from stoker.compose import agree, finish, launch, losses, parallel, planned, predicted, resume
from stoker.compose.data import Data, prepare_data, refuse_faults, refuse_rows_of_other_tasks, summary
from stoker.compose.execution import borrowed_notices, fp8_notice, layers_not_in_fp8, let_segments_grow, warm_up_reason
from stoker.compose.hardware import probe, with_loaded
from stoker.compose.model import Base, fitted, load_decoder, load_tokenizer_of, open_base_of, pad_id
from stoker.compose.run_folder import Journal, RunFolder, now, versions
from stoker.compose.session import Session
from stoker.compose.trained import embedding_noise, keep_only
from stoker.compose.trainer import Engine, add_adapter, compute_dtype, describe, make_engine, make_trainer, weight_dtype
from stoker.compose.upload import upload
from stoker.compose.vocabulary import grow
from stoker.config import show
from stoker.config.load import Loaded
from stoker.config.schema import RunConfig
from stoker.observe import progress, trackers
from stoker.observe.metrics import MetricsFile
from stoker.observe.metrics import read as read_metrics
from stoker.observe.observer import Observer
from stoker.plan import limits
from stoker.plan.adapter import loading_notice
from stoker.plan.plan import Plan, size
from stoker.train.loop import TrainingResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoker.distributed.ranks import Ranks
    from stoker.models.open import Model as LoadedModel
    from stoker.models.streamed import StreamedDecoder


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `losses`: split -> {"before", "after"}; `weights`: the folder of the adapter or the model."""

    folder: Path
    reason: str
    step: int
    seconds: float
    losses: Mapping[str, Mapping[str, float]]
    answers: tuple[tuple[str, str], ...]
    weights: Path | None
    checkpoint: Path | None
    interrupted_by: str = ""

    @property
    def exit_code(self) -> int:
        """0 when the run is done; 128 and the signal's number, as shells have it, when one interrupted it."""
        return 128 + signal.Signals[self.interrupted_by].value if self.interrupted_by else 0


@dataclass
class Model:
    """What is trained: the base, its tokenizer, and the live decoder once it is loaded."""

    base: Base
    tokenizer: "PreTrainedTokenizerBase"
    decoder: "LoadedModel | None" = None

    def session(self, plan: Plan, description: str) -> Session:
        """Returns the loaded model ready to answer, on the device it is trained on."""
        assert self.decoder is not None
        return Session(self.base, self.decoder, self.tokenizer, plan.device, compute_dtype(plan), description)


@dataclass
class _Notes:
    """What `run.json` holds: facts about the run for its report, kept across a resume."""

    folder: RunFolder
    facts: dict[str, Any] = field(default_factory=dict)
    writes: bool = True

    def add(self, **facts: Any) -> None:
        self.facts |= facts
        if self.writes:
            self.folder.write_json("run.json", self.facts)


@dataclass
class _Warnings:
    """What the user should know before training: shown as it comes, and kept for the report."""

    console: Console
    sentences: list[str] = field(default_factory=list)

    def add(self, sentences: Iterable[str]) -> None:
        for sentence in sentences:
            self.sentences.append(sentence)
            _say(self.console, sentence, style="yellow")


@dataclass(frozen=True)
class _Run:
    """A run that is ready to begin: what was asked for, what became of it, and where it is written down."""

    config: RunConfig
    plan: Plan
    model: Model
    engine: Engine
    ranks: "Ranks"
    data: Data
    folder: RunFolder
    notes: _Notes
    console: Console

    @property
    def decoder(self) -> "LoadedModel":
        """The live model."""
        assert self.model.decoder is not None
        return self.model.decoder


def train(
    loaded: Loaded,
    *,
    resume_run: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    model: Model | None = None,
    force: bool = False,
) -> RunResult:
    """Trains what the configuration describes and returns how it ended; every step of the way is shown on `console`.

    `model` is one that is loaded already (notebooks); None loads model.base. `force`: what the plan says does not fit
    is tried all the same, as near to fitting as the settings allow.

    Raises:
        UserError: something the user can mend, before the first step. TrainingError: training cannot go on.
    """
    let_segments_grow()
    ranks = parallel.join(loaded.config)
    try:
        return _train(
            loaded, ranks, resume_run=resume_run, overwrite=overwrite, console=console, model=model, force=force
        )
    finally:
        ranks.leave()


def _train(
    loaded: Loaded,
    ranks: "Ranks",
    *,
    resume_run: bool,
    overwrite: bool,
    console: Console | None,
    model: Model | None,
    force: bool,
) -> RunResult:
    console = console or progress.RunConsole(quiet=not ranks.is_first)
    config, folder = loaded.config, RunFolder.of(loaded.config.output.folder)
    parallel.require_same(ranks, config)
    resumes = ranks.share(lambda: _goes_on(config, folder, asked=resume_run, overwrite=overwrite))
    overwrite = overwrite and not resumes
    _say(console, f"stoker {stoker.__version__}  {describe(config)}", style="bold")
    warnings = _Warnings(console)
    warnings.add(launch.restarts())
    model = model or _open(config)
    config = fitted(config, model.base)
    loaded = Loaded(config, loaded.origins)
    changed = resume.changes(config, folder) if resumes else []
    data = prepare_data(config, model.tokenizer, console=console)
    agree.require_same_data(ranks, data, model.tokenizer)
    refuse_rows_of_other_tasks(config, data.audits)
    for split, text in summary(config, data):
        _say(console, f"{split:<10}  {text}")
    hardware = probe() if model.decoder is None else with_loaded(probe(), model.decoder)
    warnings.add([*data.notices, *refuse_faults(data.audits), *changed, *agree.device_warnings(ranks, hardware)])
    hardware = agree.smallest(ranks, hardware)
    plan = planned.agreed(config, model.base, data, hardware, ranks, resumed=folder if resumes else None, force=force)
    _say(console, "\n".join([plan.table(), *predicted.known_here(plan)]))
    if plan.memory.total > plan.available_bytes:
        needs = f"{size(plan.memory.total)} of {size(plan.available_bytes)}"
        warnings.add([f"By the plan this needs {needs}; --force tries it."])
    engine = load_engine(config, plan, model, data, console, ranks=ranks)
    assert model.decoder is not None
    warnings.add(_notices(config, plan, model.base, model.decoder))
    facts = ranks.share(lambda: folder.read_json("run.json") if resumes else {})
    about_data = agree.facts_of_data(data, model.tokenizer)
    warnings.add(resume.other_rows(facts.get("data", {}), about_data))
    if ranks.is_first:
        folder.claim(overwrite=overwrite)  # Last, so that a mistake found so far leaves the folder as it was.
        _write_inputs(folder, loaded, plan, data)
    agree.require_shared_folder(ranks, folder)
    notes = _Notes(folder, facts, writes=ranks.is_first)
    notes.add(
        launch=launch.run_id(),
        title=describe(config),
        versions=versions(),
        device=plan.device_name,
        data=about_data,
        notices=[{"level": "warning", "message": sentence} for sentence in warnings.sentences],
        layers_not_in_fp8=layers_not_in_fp8(model.decoder, plan),
    )
    with closing(engine):
        return _run(_Run(config, plan, model, engine, ranks, data, folder, notes, console), resumes=resumes)


def _goes_on(config: RunConfig, folder: RunFolder, *, asked: bool, overwrite: bool) -> bool:
    """Whether the run in `folder` goes on; raises OutputError where the folder does not allow what is to be done."""
    goes_on = asked or (bool(launch.restarts()) and launch.is_restarted(folder.read_json("run.json")))
    goes_on = goes_on or (config.output.resume and folder.config.exists() and not overwrite)
    folder.check(resume=goes_on, overwrite=overwrite)
    return goes_on


def _notices(config: RunConfig, plan: Plan, base: Base, decoder: "LoadedModel") -> list[str]:
    """What to know of the loaded model: what a borrowed class does not bear, and what stays out of fp8 or training."""
    of_adapter = loading_notice(base.spec, config.adapter.targets) if config.adapter else ""
    others = (fp8_notice(decoder, plan), of_adapter, limits.left_out_notice(base.spec))
    return [*borrowed_notices(decoder, packing=config.data.packing), *filter(None, others)]


def _open(config: RunConfig) -> Model:
    base = open_base_of(config)
    return Model(base, load_tokenizer_of(config, base))


def _write_inputs(folder: RunFolder, loaded: Loaded, plan: Plan, data: Data) -> None:
    folder.write_text("config.yaml", show.to_yaml(loaded.config, loaded.origins))
    folder.write_json("plan.json", plan.to_dict())
    folder.write_json("audit.json", {split: audit.to_dict() for split, audit in data.audits.items()})


def _run(run: _Run, *, resumes: bool) -> RunResult:
    journal = Journal()
    with _observers(run, journal) as observers:
        before = _losses_before(run)
        result = _learn(run, observers, resumes=resumes)
    _account(run, result, journal)
    return _interrupted(run, result) if result.reason == "interrupted" else _conclude(run, result, before)


def _losses_before(run: _Run) -> dict[str, losses.Measured]:
    """Returns the losses of the untrained model: measured now, or when the run began."""
    if "before" not in run.notes.facts:
        measured = losses.measure(run.engine, run.console)
        run.notes.add(before={split: asdict(one) for split, one in measured.items()})
    return {split: losses.Measured(**one) for split, one in run.notes.facts["before"].items()}


def _learn(run: _Run, observers: Sequence[Observer], *, resumes: bool) -> TrainingResult:
    config = run.config
    with (
        agree.watched(run.ranks, run.folder, config.engine.hang_timeout) as at,
        embedding_noise(run.decoder, config.train.embedding_noise),
    ):
        trainer = make_trainer(
            config,
            run.engine,
            run.folder,
            observers=observers,
            description={"title": describe(config)},
            warm_up_reason=warm_up_reason(run.plan),
            at=at,
        )
        return trainer.run(resume=resumes)


def _account(run: _Run, result: TrainingResult, journal: Journal) -> None:
    """Writes down how training ended and what it took, beside what the plan said."""
    config, plan, notes = run.config, run.plan, run.notes
    notes.add(
        outcome=result.reason,
        finished=now(),
        seconds=notes.facts.get("seconds", 0.0) + result.seconds,
        notices=[*notes.facts["notices"], *journal.notices],
    )
    if not journal.num_steps:  # resumed at its end: what was measured before stays, for nothing has peaked since
        return
    memory = predicted.memory(plan, run.decoder, run.engine)
    seconds = predicted.step_seconds(
        parallel.share_of_one(config, run.ranks.world_size),
        run.model.base.spec,
        plan,
        read_metrics(run.folder.metrics),
        run.data.train.lengths if run.data.windows is None else (),
        rows_a_step=config.train.batch_size,
    )
    notes.add(memory=memory, step_seconds=seconds)
    if run.ranks.is_first and (sentence := predicted.remember(config, plan, memory, seconds)):
        _say(run.console, sentence)


def _interrupted(run: _Run, result: TrainingResult) -> RunResult:
    ended = RunResult(run.folder.path, result.reason, result.step, result.seconds, {}, (), None, None)
    if run.ranks.is_first:
        finish.say_interrupted(run.console, run.folder, result)
        ended = replace(ended, checkpoint=result.checkpoint)
    # A process that a signal has ended says so by its exit code, at which launchers kill the others.
    run.ranks.wait_for_all("interrupted")
    return replace(ended, interrupted_by=result.interrupted_by)


def _conclude(run: _Run, result: TrainingResult, before: dict[str, losses.Measured]) -> RunResult:
    """Saves the tuned weights, measures and asks the model again, writes the report and uploads what is asked for."""
    config, model, engine, folder, console = run.config, run.model, run.engine, run.folder, run.console
    if result.reason == "early stopping" and result.best_checkpoint is not None:
        engine.strategy.load_weights(read(result.best_checkpoint).tensors["weights"])
        _say(console, f"The weights kept are the best ones: those of step {result.best_step}.")
    is_adapter = config.adapter is not None
    weights = folder.adapter if is_adapter else folder.model
    with engine.strategy.gathered(trained_only=is_adapter):
        if run.ranks.is_first:
            finish.save_weights(model.base, run.decoder, model.tokenizer, weights, is_adapter=is_adapter)
    after = losses.measure_again(engine, before, console)
    pairs = {split: {"before": before[split].loss, "after": loss} for split, loss in after.items()}
    answers = finish.answer(model.session(run.plan, describe(config)), config.output.questions, console)
    ended = RunResult(folder.path, result.reason, result.step, result.seconds, pairs, answers, weights, None)
    if not run.ranks.is_first:
        return ended
    run.notes.add(losses=pairs, answers=[{"question": question, "answer": text} for question, text in answers])
    finish.conclude(console, folder, losses=pairs, answers=answers, weights=weights, result=result)
    if config.output.hub_model_id is not None:
        uploaded = upload(weights, config.output.hub_model_id, revision=config.output.hub_revision, console=console)
        _say(console, f"Uploaded to {uploaded}.")
    return replace(ended, checkpoint=result.checkpoint)


def load_engine(config: RunConfig, plan: Plan, model: Model, data: Data, console: Console, *, ranks: "Ranks") -> Engine:
    """Loads the weights unless they are loaded, adds a new adapter, and makes everything that takes a step."""
    import torch

    torch.set_num_threads(plan.num_threads)
    torch.set_float32_matmul_precision("high" if config.engine.tf32 else "highest")
    torch.manual_seed(config.train.seed)
    streamed = _load(config, plan, model, console, ranks) if model.decoder is None else None
    assert model.decoder is not None
    if config.train.only is not None:
        keep_only(model.decoder, model.base.spec, config.train.only)
    engine = make_engine(
        config, plan, model.decoder, data, pad_id=pad_id(model.tokenizer), ranks=ranks, streamed=streamed
    )
    if ranks.rank:
        torch.manual_seed(config.train.seed + ranks.rank)  # no two ranks drop the same values
    return engine


def _load(config: RunConfig, plan: Plan, model: Model, console: Console, ranks: "Ranks") -> "StreamedDecoder | None":
    """Gives `model` its decoder, with a new adapter; returns what still streams the weights into each process's part,
    where weights are shared."""
    dtype, streamed, awaited = weight_dtype(config, plan), None, None
    shares = parallel.shares_weights(plan)
    whole = parallel.why_not_streamed(model.base) if shares else "alone"
    from stoker.adapters.lora import Awaited

    with console.status("loading weights"):
        if whole:
            model.decoder = load_decoder(
                model.base, device=plan.device, dtype=dtype, kernels=plan.kernels, quantization=plan.quantization
            )
        else:
            streamed = parallel.stream(config, plan, model.base, ranks, dtype=dtype)
            model.decoder = streamed.decoder
            awaited = Awaited(plan.device, streamed.weight_of)
    if shares and whole:
        _say(console, f"Each process reads the whole model, then keeps its part: {whole}.", style="yellow")
    if len(model.tokenizer) > model.base.spec.vocab_size:
        grow(model.decoder, len(model.tokenizer))
    if config.model.new_tokens or config.model.special_tokens.model_fields_set:
        model.base = model.base.with_tokens(model.tokenizer)
    if config.adapter is not None:
        add_adapter(model.decoder, config.adapter, seed=config.train.seed, awaited=awaited)
    return streamed


@contextmanager
def _observers(run: _Run, journal: Journal) -> Iterator[list[Observer]]:
    """Opens everything that watches the run, and closes it whatever happens; one of many processes speaks."""
    config, folder = run.config, run.folder
    if not run.ranks.is_first:
        yield [journal]
        return
    names = config.output.trackers
    if names == "auto":
        names = ["tensorboard"] if trackers.is_installed("tensorboard") else []
    watching = trackers.build(
        names,
        folder.path,
        run_name=folder.path.name,
        config=config.model_dump(),
        wandb=config.output.wandb.model_dump(),
    )
    observers: list[Observer] = [journal, MetricsFile(folder.metrics), *watching, progress.build(run.console)]
    try:
        yield observers
    finally:
        for observer in observers:
            observer.close()


def _say(console: Console, text: str, *, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
