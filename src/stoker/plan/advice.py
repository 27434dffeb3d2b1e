"""What others measured of methods, ranks, rates and epochs, said for a run's data and task. Nothing of it is applied.

One table of rules: for each question the first rule whose condition holds answers, with the measurement that it rests
on and its number. Sizes between the measured ones are a matter of degree: these are places to start a search from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stoker.arch.borrowed import AnySpec
from stoker.config.schema import RunConfig
from stoker.plan import facts
from stoker.plan.adapter import targeted
from stoker.plan.workload import Workload

TaskName = Literal["instructions", "continued pre-training"]
QUESTIONS = ("method", "rank", "scale", "learning rate", "epochs", "batch", "layers")
_LOWEST, _HIGHEST = 16, 256
# From here on a rank is "higher" for rank stabilisation; a rule of thumb: the paper's figures part between 8 and 128.
_HIGH_RANK = 64
_SHORT_STEPS, _FEW_ROWS, _LARGE_MODEL = 100, 2000, 30e9


@dataclass(frozen=True)
class Source:
    """A public measurement: what was found, with its number and its conditions, and where it stands."""

    name: str
    link: str
    found: str


@dataclass(frozen=True)
class Case:
    """A run as the rules see it. `tokens`: trained ones of an epoch, None where the data is not known.

    `values_per_rank`: parameters of an adapter of rank 1 on every linear layer; `device_bytes`: of the largest device
    asked about (0: not known).
    """

    task: TaskName
    tokens: float | None
    rows: int | None
    steps: int | None
    parameters: int
    values_per_rank: int
    device_bytes: int = 0

    @property
    def rank(self) -> int:
        """The lowest of 16, 32, ... 256 whose adapter has a value for each trained token; 16 where they are unknown."""
        needed = (self.tokens or 0.0) / max(1, self.values_per_rank)
        return min(_HIGHEST, max(_LOWEST, 2 ** math.ceil(math.log2(max(1.0, needed)))))

    @property
    def exceeds_adapters(self) -> bool:
        """Whether there are more trained tokens than values in an adapter of the highest rank."""
        return (self.tokens or 0.0) > _HIGHEST * self.values_per_rank

    @property
    def base_fits(self) -> bool:
        """Whether the base in two bytes a parameter leaves a fifth of the largest device to train in."""
        return not self.device_bytes or 2 * self.parameters <= 0.8 * self.device_bytes


@dataclass(frozen=True)
class Rule:
    """One answer to one question: when it holds, what it says, and the sources that it rests on."""

    question: str
    holds: Callable[[Case], bool]
    says: Callable[[Case], str]
    sources: tuple[Source, ...]


_LESS = Source(
    "LoRA Learns Less and Forgets Less",
    "https://arxiv.org/abs/2405.09673",
    "Llama-2-7B on code and maths: in continued pre-training on up to 20 billion tokens rank 256 did not close the gap "
    "to full training, on 100 thousand pairs of instructions it closed most of it. LoRA kept more of what the base "
    "knew. Recommended: all modules, alpha = 2 x rank, rates from 1e-5 to 5e-4",
)
_REGRET = Source(
    "LoRA Without Regret",
    "https://thinkingmachines.ai/blog/lora/",
    "Llama 3 of 1B and 8B on Tulu 3 and OpenThoughts 3, ranks 1 to 512: LoRA equals full training until the rank's "
    "capacity is used up; best rate about 10 x that of full training whatever the rank, about 15 x in runs of under "
    "100 steps; large batches cost LoRA more; adapters on attention alone fall behind",
)
_CAPACITY = Source(
    "Tinker's LoRA primer",
    "https://tinker-docs.thinkingmachines.ai/tinker/lora-primer/",
    "rule of its makers: LoRA does well where it has at least as many parameters as there are trained tokens",
)
_QLORA = Source(
    "QLoRA",
    "https://arxiv.org/abs/2305.14314",
    "4-bit NormalFloat under LoRA: 65B on one GPU of 48 GB, at the task performance of 16-bit fine-tuning",
)
_RSLORA = Source(
    "rsLoRA",
    "https://arxiv.org/abs/2312.03732",
    "divided by the rank, adapters of high rank learn slowly and gain nothing; divided by its square root they gain",
)
_LORA_PLUS = Source(
    "LoRA+",
    "https://arxiv.org/abs/2402.12354",
    "a higher rate for B than for A: 1 to 2% better and up to 2 x faster, at the same cost a step",
)
_TULU = Source(
    "Tulu 3",
    "https://huggingface.co/allenai/Llama-3.1-Tulu-3-8B-SFT",
    "every weight on instructions: 5e-6 for 8B, 2e-6 for 70B and 405B, in batches of 128 to 256",
)
_REPEATED = Source(
    "Scaling Data-Constrained Language Models",
    "https://arxiv.org/abs/2305.16264",
    "400 runs of up to 9B parameters: up to 4 epochs of repeated data are worth nearly as much as new data",
)
_LIMA = Source(
    "LIMA",
    "https://arxiv.org/abs/2305.11206",
    "65B on 1,000 chosen examples: answers as good as or preferred to GPT-4's in 43% of cases; perplexity on held-out "
    "answers did not tell which model was better",
)


def _count(number: float) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


def _full(case: Case) -> bool:
    return case.exceeds_adapters


RULES: tuple[Rule, ...] = (
    Rule(
        "method",
        lambda case: case.task == "continued pre-training" and _full(case),
        lambda case: "every weight: the text holds more tokens than an adapter of rank 256 has values",
        (_LESS, _CAPACITY),
    ),
    Rule(
        "method",
        _full,
        lambda case: "every weight, or LoRA of rank 256 if the base's other abilities must be kept",
        (_REGRET, _LESS),
    ),
    Rule(
        "method",
        lambda case: not case.base_fits,
        lambda case: "QLoRA (model.quantization: nf4): the base in 16 bits leaves too little of the device",
        (_QLORA,),
    ),
    Rule(
        "method",
        lambda case: case.task == "continued pre-training",
        lambda case: "LoRA at this amount of text; every weight if the domain is far from what the base knows",
        (_LESS, _REGRET),
    ),
    Rule("method", lambda case: True, lambda case: "LoRA: as good as every weight at this size", (_REGRET,)),
    Rule(
        "rank", lambda case: case.tokens is None, lambda case: "16 to begin with: the data is not known", (_CAPACITY,)
    ),
    Rule(
        "rank",
        lambda case: True,
        lambda case: (
            f"{case.rank}: {_count(case.rank * case.values_per_rank)} values for "
            f"{_count(case.tokens or 0)} trained tokens"
        ),
        (_CAPACITY,),
    ),
    Rule(
        "scale",
        lambda case: case.rank >= _HIGH_RANK,
        lambda case: "rank-stabilised (adapter.rank_stabilized: true)",
        (_RSLORA,),
    ),
    Rule("scale", lambda case: True, lambda case: f"alpha = 2 x rank = {2 * case.rank}", (_LESS,)),
    Rule(
        "learning rate",
        lambda case: _full(case) and case.parameters >= _LARGE_MODEL,
        lambda case: "2e-6 to 1e-5 for every weight; ten times that for LoRA",
        (_TULU, _REGRET),
    ),
    Rule(
        "learning rate",
        _full,
        lambda case: "5e-6 to 2e-5 for every weight; ten times that for LoRA",
        (_TULU, _REGRET),
    ),
    Rule(
        "learning rate",
        lambda case: case.steps is not None and case.steps < _SHORT_STEPS,
        lambda case: f"2e-4 to 5e-4: the upper part of the range, for a run of {case.steps} steps",
        (_REGRET, _LESS),
    ),
    Rule(
        "learning rate",
        lambda case: case.parameters >= _LARGE_MODEL,
        lambda case: "2e-5 to 2e-4: ten times what every weight of a model of this size was given",
        (_TULU, _REGRET),
    ),
    Rule(
        "learning rate",
        lambda case: True,
        lambda case: "5e-5 to 5e-4, the highest that is stable; train.lora_plus_ratio may speed it up",
        (_LESS, _REGRET, _LORA_PLUS),
    ),
    Rule(
        "epochs",
        lambda case: case.rows is not None and case.rows <= _FEW_ROWS and case.task == "instructions",
        lambda case: "3 or 4, judged by answers as well as by the held-out loss; better rows before more epochs",
        (_REPEATED, _LIMA),
    ),
    Rule("epochs", _full, lambda case: "1, up to 4 if there is no more data", (_REPEATED,)),
    Rule(
        "epochs",
        lambda case: True,
        lambda case: "1 to 4, the best by the held-out loss (data.validation)",
        (_REPEATED,),
    ),
    Rule("batch", lambda case: not _full(case), lambda case: "small rather than large: 8 to 32 rows", (_REGRET,)),
    Rule("layers", lambda case: not _full(case), lambda case: "all linear layers (adapter.targets)", (_REGRET, _LESS)),
)


@dataclass(frozen=True)
class Advice:
    """An answer to a question, and what it rests on."""

    question: str
    answer: str
    sources: Sequence[Source]


def case_of(config: RunConfig, spec: AnySpec, work: Workload, *, rows: int | None, device_bytes: int = 0) -> Case:
    """Returns a run as the rules see it; `rows`: documents of the data, None where they are not known."""
    tokens = None
    if rows is not None and work.sequences is not None:
        tokens = work.sequences * work.rows.tokens * work.rows.trained_share
    return Case(
        task="continued pre-training" if config.task.kind == "pretrain" else "instructions",
        tokens=tokens,
        rows=rows,
        steps=work.steps,
        parameters=facts.num_parameters(spec),
        values_per_rank=facts.lora_parameters(spec, 1, tuple(targeted(spec, "all-linear"))),
        device_bytes=device_bytes,
    )


def advise(case: Case) -> list[Advice]:
    """Returns the answer to each question that has one, by the first rule that holds."""
    found = []
    for question in QUESTIONS:
        rule = next((one for one in RULES if one.question == question and one.holds(case)), None)
        if rule is not None:
            found.append(Advice(question, rule.says(case), rule.sources))
    return found


def lines(case: Case) -> list[str]:
    """Returns the advice for people: each answer with its sources by number, then the sources."""
    found = advise(case)
    sources = list(dict.fromkeys(source for one in found for source in one.sources))
    size = "data not known" if case.rows is None else f"{case.rows:,} rows"
    text = [f"Advice for {case.task}, {size} (what others measured; nothing of it is applied):"]
    for one in found:
        numbers = "".join(f"[{sources.index(source) + 1}]" for source in one.sources)
        text.append(f"  {one.question:<13}  {one.answer} {numbers}")
    text += [f"  [{number}] {one.name}, {one.link}: {one.found}." for number, one in enumerate(sources, start=1)]
    return text
