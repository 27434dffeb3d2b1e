"""`stoker eval`: loss and perplexity of a model on the rows of a run."""

import json
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from stoker.compose import artifact
from stoker.compose.data import loader, prepare_data, refuse_faults, refuse_rows_of_other_tasks
from stoker.compose.hardware import probe
from stoker.compose.model import Base, load_decoder, load_tokenizer, open_base, pad_id
from stoker.compose.run_folder import RunFolder
from stoker.compose.trainer import compute_dtype
from stoker.compose.vocabulary import Tokens
from stoker.config.schema import RunConfig
from stoker.plan import limits
from stoker.plan.choose import Statistics, choose
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoker.distributed.single import SingleDevice


def evaluate(
    config: RunConfig, *, model: str | None = None, json_output: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Prints and returns the loss on data.validation, or on data.train when there is none.

    `model` is what to evaluate (a run's, adapter's or model's folder, Hub id or builtin); None: what the run in
    output.folder trained.
    """
    from stoker.train.evaluate import evaluate as run

    console = console or Console()
    quiet = Console(stderr=True)
    found = artifact.find(model or str(RunFolder.of(config.output.folder).path))
    trusted = config.model.trust_remote_code or found.trust_remote_code
    base = open_base(found.base, revision=found.revision, trust_remote_code=trusted, overrides=found.overrides)
    config = limits.fitted(_with_base_of(config, found, base), base.spec)
    tokenizer = _tokenizer(config, found, base)
    data = prepare_data(config, tokenizer, console=quiet)
    refuse_rows_of_other_tasks(config, data.audits)
    refuse_faults(data.audits)
    split = "train" if data.validation is None else "validation"
    documents = data.train if data.validation is None else data.validation
    plan = choose(config, base.spec, probe(), statistics=Statistics(data.longest))
    strategy = _ready(base, found, plan)
    batches = loader(config, documents, micro_batch_size=plan.micro_batch_size, pad_id=pad_id(tokenizer))
    result = run(strategy, batches.all())
    facts = {
        "model": found.description,
        "split": split,
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700.0)),
        "num_trained_tokens": result.num_trained_tokens,
        "seconds": round(result.seconds, 3),
    }
    if json_output:
        console.print_json(json.dumps(facts))
    else:
        console.print(
            f"{escape(found.description)} on {split}: loss [bold]{result.loss:.4f}[/], "
            f"perplexity {facts['perplexity']:.3f} ({result.num_trained_tokens:,} trained tokens, "
            f"{result.seconds:.1f}s)",
            highlight=False,
            soft_wrap=True,
        )
    return facts


def _tokenizer(config: RunConfig, found: artifact.Artifact, base: Base) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer that was saved with what is evaluated, which has its tokens already, or the YAML's."""
    if found.tokenizer:
        return load_tokenizer(base, override=found.tokenizer)
    chosen, tokens = config.model, Tokens.of(config.model, may_grow=False)
    return load_tokenizer(base, override=chosen.tokenizer, chat_template=chosen.chat_template, tokens=tokens)


def _ready(base: Base, found: artifact.Artifact, plan: Plan) -> "SingleDevice":
    """Returns a strategy with the model, its adapter on it, loaded as the plan says."""
    import torch

    from stoker.distributed.single import SingleDevice
    from stoker.export import adapter
    from stoker.tasks.supervised import SupervisedTask

    torch.set_num_threads(plan.num_threads)
    decoder = load_decoder(
        base,
        device=plan.device,
        dtype=compute_dtype(plan),
        kernels=plan.kernels,
        quantization=plan.quantization,
    )
    if found.adapter is not None:
        adapter.load(decoder, found.adapter)
    strategy = SingleDevice(plan.device, precision=plan.precision)
    strategy.prepare(SupervisedTask(decoder, kernels=plan.kernels))
    return strategy


def _with_base_of(config: RunConfig, found: artifact.Artifact, base: Base) -> RunConfig:
    """Returns the configuration with the base in the format in which the run trained on it, or else the YAML's."""
    kind = found.quantization if found.quantization is not None else config.model.quantization
    model = config.model.model_copy(update={"quantization": base.quantization(kind)})
    return config.model_copy(update={"model": model})
