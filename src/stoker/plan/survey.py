"""What a run would take on each device with each method: time and cost, ranked, with a recommendation and its reasons.

`choose` finds the micro-batch, the rung and the offload on a device; here devices and methods stand beside one another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.config.schema import Adapter, RunConfig
from stoker.errors import ConfigError, PlanError
from stoker.plan import speed
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.choose import Statistics, choose
from stoker.plan.hardware import Device, Hardware
from stoker.plan.memory import BASE_BYTES, GIB, VALUE_BYTES, frozen_weight_bytes, optimizer_bytes
from stoker.plan.plan import Plan
from stoker.plan.speed import MEASURED, Efficiencies, Step
from stoker.plan.workload import Documents, Workload, workload

Method = Literal["full", "lora", "nf4", "int8", "fp8"]
METHODS: tuple[Method, ...] = ("full", "lora", "nf4", "int8", "fp8")
METHOD_NAMES: Mapping[str, str] = {
    "full": "every weight",
    "lora": "adapter",
    "nf4": "adapter on NF4",
    "int8": "adapter on int8",
    "fp8": "adapter on fp8",
}
# A quantised base changes the result a little: it must be this much better to be recommended over a plain one.
_QUANTISED_MUST_GAIN = 1.1
# How much faster something must be to be worth a sentence.
_WORTH_SAYING = 1.05
# What the process holds in host memory besides what waits there: Python, PyTorch, one shard being read. Rule of thumb.
_PROCESS_BYTES = 4 * GIB


@dataclass(frozen=True)
class Request:
    """What is asked: a run, its model and data, and what is allowed. `host_bytes`: of the hosts that devices are in."""

    config: RunConfig
    spec: AnySpec
    documents: Documents | None
    methods: Sequence[Method]
    host_bytes: int = 64 * GIB
    budget_usd: float | None = None
    deadline_hours: float | None = None
    efficiencies: Efficiencies = MEASURED

    @cached_property
    def _packed(self) -> Workload:
        return workload(self.config, self.documents)

    def work(self, micro_rows: int) -> Workload:
        """Returns the run's work with micro-batches of so many rows, which matter where rows are padded."""
        if self.config.data.packing:
            return self._packed
        return workload(self.config, self.documents, micro_rows=micro_rows)


@dataclass(frozen=True)
class Offer:
    """A device with a method. `plan` is None where it does not fit, and `why` says what is missing.

    `hours` and `usd` are of the whole run, None where its length or the device's price is not known.
    """

    device: CatalogueDevice
    method: Method
    config: RunConfig
    plan: Plan | None
    step: Step | None
    work: Workload
    hours: float | None
    usd: float | None
    why: str
    spec: AnySpec

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.plan is not None

    @property
    def name(self) -> str:
        """The device and the method, for people."""
        return f"{self.device.name}, {METHOD_NAMES[self.method]}"

    @property
    def tokens_per_second(self) -> float:
        """Tokens that go through the model a second, padding included; 0 where it does not fit."""
        return self.config.train.batch_size * self.work.rows.tokens / self.step.seconds if self.step else 0.0

    @property
    def usd_per_step(self) -> float | None:
        """Cost of a step."""
        price = self.device.price
        return None if price is None or self.step is None else self.step.seconds / 3600 * price.usd_per_hour

    def memory(self) -> dict[str, int]:
        """Returns the bytes of the device at the peak by category; attention's workspace is among the activations."""
        plan = self.plan
        if plan is None:
            return {}
        held = plan.memory
        base = 0
        if self.config.adapter is not None:
            base = frozen_weight_bytes(self.spec, plan.quantization, VALUE_BYTES[plan.precision])
        of_trained = "adapters" if self.config.adapter is not None else "weights"
        context = BASE_BYTES[self.device.device().kind]
        parts = {
            "weights": base,
            "adapters": 0,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "activations": held.activations,
            "logits": held.logits,
            "dequantisation": held.scratch,
            "transposed": held.transposed,
            "communication": 0,
            "context": context,
            "fragmentation": held.reserve - context,
        }
        parts[of_trained] += held.weights - base
        return parts

    @property
    def host_bytes(self) -> int:
        """Host memory of the process."""
        return (self.plan.host_bytes if self.plan else 0) + _PROCESS_BYTES

    @property
    def disk_bytes(self) -> int:
        """Disk for checkpoints, the best one among them, and for what is saved at the end."""
        plan, config = self.plan, self.config
        if plan is None:
            return 0
        each = plan.num_trained_parameters * (4 + optimizer_bytes(config.train.optimizer))
        best = config.data.validation is not None and config.output.keep_best
        return round(each * (config.output.keep_last + best) + 4 * plan.num_trained_parameters)


def allowed_methods(config: RunConfig) -> tuple[Method, ...]:
    """Returns the methods that a YAML leaves open: every weight, or an adapter on the base in its format."""
    if config.adapter is None:
        return ("full",)
    if "quantization" in config.model.model_fields_set:
        kind = config.model.quantization
        return ("lora",) if kind == "none" else (kind,)
    return ("lora", "nf4", "int8", "fp8")


def methods_of(names: str) -> tuple[Method, ...]:
    """Returns the methods of a list such as "lora,nf4".

    Raises:
        ConfigError: there is no such method.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in METHODS]
    if unknown or not asked:
        what = f"--methods {names!r}: {', '.join(unknown) or 'nothing'} is no method."
        raise ConfigError(what, fix=f"Use {', '.join(METHODS)}.")
    return tuple(method for method in METHODS if method in asked)


def survey(request: Request, devices: Sequence[CatalogueDevice]) -> list[Offer]:
    """Returns an offer for each device and method: what fits first, by the time of a step; then what does not."""
    offers = [_offer(request, device, method) for device in devices for method in request.methods]
    return sorted(offers, key=lambda one: (not one.fits, one.step.seconds if one.step else 0.0))


def _with_method(config: RunConfig, method: Method) -> RunConfig:
    adapter = None if method == "full" else config.adapter or Adapter()
    kind = method if method in ("nf4", "int8", "fp8") else "none"
    model = config.model.model_copy(update={"quantization": kind})
    return config.model_copy(update={"adapter": adapter, "model": model})


def _offer(request: Request, device: CatalogueDevice, method: Method) -> Offer:
    config, spec = _with_method(request.config, method), request.spec
    nothing = Offer(device, method, config, None, None, request.work(1), None, None, "", spec)
    try:
        plan = choose(config, spec, _machine(request, device), statistics=_statistics(request), advise=False)
    except PlanError as error:
        return replace(nothing, why=" ".join(problem.what for problem in error.problems))
    work = request.work(plan.micro_batch_size)
    step = speed.step(config, spec, plan, device, rows=work.rows, efficiencies=request.efficiencies)
    hours = None
    if work.steps is not None:
        hours = (work.steps * step.seconds + speed.start_seconds(spec, request.efficiencies)) / 3600
    usd = None if hours is None or device.price is None else hours * device.price.usd_per_hour
    return replace(nothing, plan=plan, work=work, step=step, hours=hours, usd=usd, why=_why(plan, step, spec))


def _machine(request: Request, device: CatalogueDevice) -> Hardware:
    one = device.device()
    host = Device("cpu", "host", request.host_bytes)
    return Hardware((one,) if one.kind == "cpu" else (one, host), num_threads=16)


def _statistics(request: Request) -> Statistics | None:
    documents = request.documents
    return Statistics(max(documents.lengths)) if documents is not None and documents.lengths else None


def _why(plan: Plan, step: Step, spec: AnySpec) -> str:
    """One line: what the plan does, and what most of its time goes into."""
    parts = sorted(step.parts().items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in parts[:2])
    offload = " and on the host" if plan.offload_activations else ""
    coarse = "; a coarser estimate (not native)" if isinstance(spec, BorrowedSpec) else ""
    return f"{plan.recompute}{offload}; time: {most}{coarse}"


@dataclass(frozen=True)
class Verdict:
    """The recommendation and its reasons, in sentences; `best` is None where nothing will do."""

    best: Offer | None
    second: Offer | None
    because: str
    runner_up: str
    would_change: tuple[str, ...]


def verdict(request: Request, offers: Sequence[Offer]) -> Verdict:
    """Returns what to do: the cheapest within a deadline, the fastest within a budget, else least time x cost."""
    fitting = [one for one in offers if one.fits]
    if not fitting:
        return Verdict(None, None, "Nothing fits on these devices.", "", tuple(_nearest(request, offers)))
    eligible = [one for one in fitting if _within(request, one)]
    if not eligible:
        return Verdict(None, None, _why_none(request, fitting), "", ())
    ranked = sorted(eligible, key=lambda one: _score(request, one, eligible))
    best = ranked[0]
    # Another device says more than another method on the same one, which `_changes` speaks of.
    others = [one for one in ranked if one.device.key != best.device.key]
    second = next(iter([*others, *ranked[1:]]), None)
    return Verdict(
        best,
        second,
        _because(request, eligible),
        "" if second is None else _lost(best, second),
        tuple(_changes(request, best, second, fitting)),
    )


def pareto(offers: Sequence[Offer]) -> list[Offer]:
    """Returns the offers that no other beats in both time and cost, from the fastest to the cheapest."""
    priced = [one for one in offers if one.step and one.usd_per_step is not None]
    line: list[Offer] = []
    for one in sorted(priced, key=lambda one: (one.step.seconds if one.step else 0.0, one.usd_per_step or 0.0)):
        if not line or (one.usd_per_step or 0.0) < (line[-1].usd_per_step or 0.0):
            line.append(one)
    return line


def _within(request: Request, one: Offer) -> bool:
    if request.deadline_hours is not None and (one.hours is None or one.hours > request.deadline_hours):
        return False
    return request.budget_usd is None or (one.usd is not None and one.usd <= request.budget_usd)


def _score(request: Request, one: Offer, among: Sequence[Offer]) -> tuple[bool, float]:
    """What is least for the best offer; those without a price come after those with one."""
    assert one.step is not None
    penalty = _QUANTISED_MUST_GAIN if one.method in ("nf4", "int8", "fp8") else 1.0
    seconds, usd = one.step.seconds, one.usd_per_step
    if all(other.usd_per_step is None for other in among):
        return False, penalty * seconds
    if usd is None:
        return True, penalty * seconds
    if request.deadline_hours is not None:
        return False, penalty * usd
    return False, penalty * (seconds if request.budget_usd is not None else seconds * usd)


def _because(request: Request, eligible: Sequence[Offer]) -> str:
    if all(one.usd_per_step is None for one in eligible):
        return "the fastest; no price is known"
    if request.deadline_hours is not None:
        budget = f" and ${request.budget_usd:,.2f}" if request.budget_usd is not None else ""
        return f"the cheapest within {request.deadline_hours:g} h{budget}"
    if request.budget_usd is not None:
        return f"the fastest within ${request.budget_usd:,.2f}"
    return "least time x cost; --deadline asks for the cheapest in time, --budget for the fastest for the money"


def _why_none(request: Request, fitting: Sequence[Offer]) -> str:
    timed = [one for one in fitting if one.hours is not None]
    if not timed:
        return "How long the run is is not known, so neither is whether it keeps to a deadline or a budget."
    fastest = min(timed, key=lambda one: one.hours or 0.0)
    cheapest = min((one for one in timed if one.usd is not None), key=lambda one: one.usd or 0.0, default=None)
    money = f"; the cheapest is {cheapest.name} for ${cheapest.usd:,.2f}" if cheapest else "; no price is known"
    return f"Nothing keeps to that: the fastest is {fastest.name} in {fastest.hours:,.2f} h{money}."


def _lost(best: Offer, second: Offer) -> str:
    assert best.step is not None
    assert second.step is not None
    ratio = second.step.seconds / best.step.seconds
    time = f"takes {ratio:.2f} x the time" if ratio >= 1 else f"takes {ratio:.2f} x the time, which is less,"
    if best.usd_per_step and second.usd_per_step:
        return f"{second.name} {time} and {second.usd_per_step / best.usd_per_step:.2f} x the money"
    return f"{second.name} {time}" + (" and has no price here" if second.usd_per_step is None else "")


def _changes(request: Request, best: Offer, second: Offer | None, fitting: Sequence[Offer]) -> list[str]:
    """Sentences on what would make another answer right."""
    said = []
    if (more := _with_more_memory(request, best)) is not None:
        said.append(more)
    if second is not None and best.usd_per_step and second.usd_per_step and request.budget_usd is None:
        price = best.device.price
        assert price is not None
        factor = _score(request, second, [best])[1] / _score(request, best, [best])[1]
        if second.device.key != best.device.key:
            here = f"here ${price.usd_per_hour:.2f}, {price.kind}, {price.date}"
            limit = f"above ${price.usd_per_hour * factor:.2f} an hour for {best.device.name} ({here})"
            said.append(f"{limit}, {second.name} would win")
    plain = next((one for one in fitting if one.device.key == best.device.key and one.method == "lora"), None)
    if best.method not in ("full", "lora") and plain is not None and plain.step and best.step:
        said.append(
            f"to leave the base as it is: {plain.name}, {plain.step.seconds / best.step.seconds:.2f} x the time"
        )
    fastest = min(fitting, key=lambda one: one.step.seconds if one.step else 0.0)
    if fastest is not best and fastest.step and best.step:
        hours = f" in {fastest.hours:,.2f} h" if fastest.hours is not None else ""
        gain = best.step.seconds / fastest.step.seconds
        if gain > _WORTH_SAYING:
            said.append(f"if only time counts: {fastest.name}, {gain:.1f} x faster{hours}")
    return said


def _with_more_memory(request: Request, best: Offer) -> str | None:
    """What the device could do if its memory were no limit, where that changes anything."""
    plan = best.plan
    if plan is None or best.step is None or set(plan.keep) == {"all"}:
        return None
    roomy = replace(best.device, memory_bytes=1024 * GIB)
    offer = _offer(request, roomy, best.method)
    if offer.plan is None or offer.step is None or offer.step.seconds > 0.98 * best.step.seconds:
        return None
    need = offer.plan.memory.total / GIB
    return (
        f"with {need:,.0f} GiB nothing would be computed again: {best.step.seconds / offer.step.seconds:.2f} x faster"
    )


def _nearest(request: Request, offers: Sequence[Offer]) -> list[str]:
    """What would fit, by the advice that `choose` gives on the largest of the devices."""
    if not offers:
        return []
    largest = max(offers, key=lambda one: one.device.memory_bytes)
    try:
        choose(largest.config, request.spec, _machine(request, largest.device), statistics=_statistics(request))
    except PlanError as error:
        return [f"{largest.device.name}: {problem.fix}" for problem in error.problems if problem.fix]
    return []
