"""What a run would take on each device with each method: time and cost, ranked, with a recommendation and its reasons.

`choose` finds the micro-batch, the rung and the offload on a device; here devices and methods stand beside one another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from stoker.arch import activations
from stoker.arch.activations import Micro
from stoker.arch.borrowed import AnySpec, BorrowedSpec
from stoker.config.schema import Adapter, RunConfig
from stoker.errors import ConfigError, PlanError
from stoker.plan import speed
from stoker.plan.candidates import Candidate, micro_of
from stoker.plan.catalogue import CatalogueDevice
from stoker.plan.choose import Choice, Options, Statistics, check, settle
from stoker.plan.efficiencies import MEASURED, Efficiencies
from stoker.plan.hardware import Device, Hardware
from stoker.plan.memory import BASE_BYTES, GIB, VALUE_BYTES, frozen_weight_bytes
from stoker.plan.plan import Plan
from stoker.plan.rates import CORES, Rates, on_threads
from stoker.plan.speed import Step
from stoker.plan.spread import SINGLE, STRATEGIES, Spread, configured, share, spreads
from stoker.plan.states import bytes_each
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
# A strategy must be faster by more than this than a simpler one.
_AS_FAST = 1.02
# From so many tokens on, products take the time of their arithmetic, whatever the micro-batch.
_SATURATING_TOKENS = 1024
_MORE = " (--gpus-per-node, --nodes: how many there are)"
# What the process holds in host memory besides what waits there: Python, PyTorch, one shard being read. Rule of thumb.
_PROCESS_BYTES = 4 * GIB


@dataclass(frozen=True)
class Request:
    """What is asked: a run, its model and data, and what is allowed.

    `host_bytes`: of the host, for each device in it. `nodes` of `per_node` devices: the most that there are.
    `num_threads`: of the machine at hand (None: it is another).
    """

    config: RunConfig
    spec: AnySpec
    documents: Documents | None
    methods: Sequence[Method]
    host_bytes: int = 64 * GIB
    budget_usd: float | None = None
    deadline_hours: float | None = None
    efficiencies: Efficiencies = MEASURED
    nodes: int = 1
    per_node: int = 1
    num_threads: int | None = None

    def figures_of(self, device: CatalogueDevice) -> Efficiencies:
        """Returns the shares of its figures that a device reaches: a CPU of the catalogue has its own."""
        if device.vendor == "cpu" and self.efficiencies is MEASURED:
            return on_threads(CORES)
        return self.efficiencies

    @cached_property
    def _works(self) -> dict[int, Workload]:
        return {}

    def work(self, micro_rows: int) -> Workload:
        """Returns the run's work with micro-batches of so many rows, which matter where rows are padded."""
        key = 1 if self.config.data.packing else micro_rows
        if key not in self._works:
            self._works[key] = workload(self.config, self.documents, micro_rows=key)
        return self._works[key]

    @cached_property
    def _methods(self) -> dict[Method, RunConfig | PlanError]:
        return {}

    def with_method(self, method: Method) -> RunConfig:
        """Returns the configuration with a method; raises PlanError where the model cannot do what it asks."""
        if method not in self._methods:
            config = _with_method(self.config, method)
            try:
                check(config, self.spec)
            except PlanError as error:
                self._methods[method] = error
            else:
                self._methods[method] = config
        found = self._methods[method]
        if isinstance(found, PlanError):
            raise found
        return found

    @cached_property
    def statistics(self) -> Statistics | None:
        """What is known of the longest document."""
        documents = self.documents
        return Statistics(max(documents.lengths)) if documents is not None and documents.lengths else None

    def statistics_of_part(self, sharing: int) -> Statistics | None:
        """Returns the same of a device's part of rows that so many share."""
        whole = self.statistics
        return whole and Statistics(-(-whole.longest // sharing))


@dataclass(frozen=True)
class Offer:
    """A method on a device, or on several. `choice` is None where it does not fit, and `why_not` says what is missing.

    `hours` and `usd` are of the whole run, None where its length or the device's price is not known.
    """

    device: CatalogueDevice
    method: Method
    config: RunConfig
    choice: Choice | None
    step: Step | None
    work: Workload
    hours: float | None
    usd: float | None
    why_not: str
    spec: AnySpec
    spread: Spread = SINGLE

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.choice is not None

    @cached_property
    def plan(self) -> Plan | None:
        """The plan, with a reason for each choice; None where it does not fit."""
        return None if self.choice is None else self.choice.plan()

    @cached_property
    def why(self) -> str:
        """One line: what is missing, or what the plan does and what most of its time goes into."""
        if self.choice is None or self.step is None:
            return self.why_not
        return _why(self.choice.best, self.step, self.spec)

    @property
    def step_seconds(self) -> float:
        """Of an optimiser step; 0 where it does not fit."""
        return self.step.seconds if self.step else 0.0

    @property
    def name(self) -> str:
        """The devices and the method, for people."""
        way = "" if self.num_devices == 1 else f", {self.spread.name}"
        return f"{self.devices}, {METHOD_NAMES[self.method]}{way}"

    @property
    def num_devices(self) -> int:
        """How many devices it takes."""
        return self.spread.num_processes

    @property
    def devices(self) -> str:
        """Which and how many, for people."""
        return self.device.name if self.num_devices == 1 else f"{self.num_devices} x {self.device.name}"

    @property
    def tokens_per_second(self) -> float:
        """Tokens that go through the model a second, padding included; 0 where it does not fit."""
        rows = self.spread.groups * self.config.train.batch_size
        return rows * self.work.rows.tokens / self.step.seconds if self.step else 0.0

    @property
    def usd_per_step(self) -> float | None:
        """Cost of a step, of all devices."""
        price = self.device.price
        if price is None or self.step is None:
            return None
        return self.num_devices * self.step.seconds / 3600 * price.usd_per_hour

    def memory(self) -> dict[str, int]:
        """Returns the bytes of one device at the peak by category."""
        plan = self.plan
        if plan is None:
            return {}
        held = plan.memory
        base = 0
        if self.config.adapter is not None:
            whole = frozen_weight_bytes(self.spec, plan.quantization, VALUE_BYTES[plan.precision])
            base = whole // self.spread.weight_shards
        of_trained = "adapters" if self.config.adapter is not None else "weights"
        context = BASE_BYTES[self.device.device().kind]
        workspace = min(held.activations, self._attention_workspace(plan))
        parts = {
            "weights": base,
            "adapters": 0,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "activations": held.activations - workspace,
            "attention": workspace,
            "logits": held.logits,
            "dequantisation": held.scratch,
            "transposed": held.transposed,
            "communication": held.communication,
            "context": context,
            "fragmentation": held.reserve - context,
        }
        parts[of_trained] += held.weights - base
        return parts

    @property
    def micro(self) -> Micro:
        """What decides how much layers hold of a micro-batch of the plan."""
        plan = self.plan
        assert plan is not None
        tokens = plan.micro_batch_size * plan.row_tokens
        options = {"precision": plan.precision, "device": self.device.device(), "uses_triton": plan.kernels == "triton"}
        return micro_of(self.config, self.spec, tokens, **options)

    def _attention_workspace(self, plan: Plan) -> int:
        """Bytes that attention's backward needs of its own at the peak, in the layer that needs most."""
        if plan.layers != "fused" or isinstance(self.spec, BorrowedSpec):
            return 0
        micro = self.micro
        pairs = {(id(layer), rung): layer for layer, rung in zip(self.spec.layers, plan.keep, strict=True)}
        return max(
            (
                activations.attention_workspace(layer, self.spec.hidden_size, micro, rung, plan.tile_tokens)
                for (_, rung), layer in pairs.items()
            ),
            default=0,
        )

    @property
    def host_bytes(self) -> int:
        """Host memory of the processes of a node."""
        here = min(self.spread.per_node, self.num_devices)
        plan = self.plan
        return here * ((plan.host_bytes + plan.memory.states_on_host if plan else 0) + _PROCESS_BYTES)

    @property
    def disk_bytes(self) -> int:
        """Disk for checkpoints, the best one among them, and for what is saved at the end."""
        plan, config = self.plan, self.config
        if plan is None:
            return 0
        each = plan.num_trained_parameters * (4 + bytes_each(config.train.optimizer, config.adapter))
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


def survey(request: Request, devices: Sequence[CatalogueDevice], *, every_strategy: bool = False) -> list[Offer]:
    """Returns offers for each device, method and number of it: what fits by the time of a step, then what does not.

    Of the strategies over several devices, those that a simpler one shows to be no faster by more than 2% are left out,
    unless `every_strategy` is asked for.
    """
    counts: dict[int, list[Spread]] = {}
    for way in ways_of(request):
        counts.setdefault(way.num_processes, []).append(way)
    offers: list[Offer] = []
    for method in request.methods:
        for device in devices:
            for count, ways in counts.items():
                if count == 1 or device.vendor != "cpu":
                    offers += _over(request, device, method, ways, every_strategy=every_strategy)
    return sorted(offers, key=lambda one: (not one.fits, one.step_seconds))


def _over(
    request: Request, device: CatalogueDevice, method: Method, ways: Sequence[Spread], *, every_strategy: bool
) -> list[Offer]:
    """Returns offers over one number of a device; `ways`: the strategies, from the simplest on."""
    found: list[Offer] = []
    for way in ways:
        if not every_strategy and any(one.fits and _is_beaten(way, one) for one in found):
            continue
        found.append(offer(request, device, method, way))
        if not every_strategy and found[-1].fits and found[-1].step_seconds <= _AS_FAST * _least_seconds(found[-1]):
            break
    return found


def _is_beaten(way: Spread, one: Offer) -> bool:
    """Whether a strategy takes at least the memory and at least the time of a simpler one that fits.

    ZeRO-3 moves and divides what FSDP2 does, and has a flat copy beside it. Of an adapter, what ZeRO-1 and -2 spare of
    states (12 bytes a value) is less than their buckets of gradients (18, up to a gigabyte of gradients), and they sum
    and gather no less than DDP.
    """
    if one.spread.strategy == "fsdp2":
        return way.stage == 3 and one.spread.reshards is not False and not way.on_host
    assert one.choice is not None
    is_small = one.config.adapter is not None and 4 * one.choice.best.num_trained_parameters <= 10**9
    return one.spread.strategy == "ddp" and way.stage in (1, 2) and is_small and not way.on_host


def _least_seconds(one: Offer) -> float:
    """Returns what no other strategy over as many devices takes less than, of an offer that fits.

    Another may have the memory to compute nothing again, wait for nothing, turn weights once for larger micro-batches,
    and divide the optimiser's work.
    """
    assert one.choice is not None
    assert one.step is not None
    best, step = one.choice.best, one.step
    if best.accumulation_steps > 1 and best.rows * one.work.rows.tokens < _SATURATING_TOKENS:
        return 0.0
    spared = step.recompute + step.waiting + step.communication
    spared += step.dequantise * (1.0 - 1.0 / best.accumulation_steps)
    spared += step.optimizer * (1.0 - one.spread.optimizer_shards / one.num_devices)
    return step.seconds - spared


def _simplicity(one: Offer) -> int:
    """Its strategy's place among all, the simplest first."""
    return [("single", 0), *STRATEGIES].index((one.spread.strategy, one.spread.stage))


def simplest(offers: Sequence[Offer]) -> list[Offer]:
    """Returns one strategy for each number of a device and method that fits: the simplest of those that are as fast."""
    best: dict[tuple[str, str, int], Offer] = {}
    for one in sorted((one for one in offers if one.fits), key=_simplicity):
        key = (one.device.key, one.method, one.num_devices)
        before = best.get(key)
        if before is None or (one.step and before.step and before.step.seconds > _AS_FAST * one.step.seconds):
            best[key] = one
    return [one for one in offers if best.get((one.device.key, one.method, one.num_devices)) is one]


def ways_of(request: Request) -> list[Spread]:
    """Returns one device, and each strategy over 2, 4, 8, ... devices of a node and of 2, 4, ... nodes."""
    engine = request.config.engine
    counts = [*_doubled(request.per_node), *(request.per_node * nodes for nodes in _doubled(request.nodes))]
    found = [SINGLE]
    for count in dict.fromkeys(count for count in counts if count > 1):
        ways = spreads(count, request.per_node, asked=engine.strategy)
        found += [configured(way, request.config) for way in ways]
    return found


def _doubled(most: int) -> list[int]:
    """2, 4, 8, ... up to `most`, itself included."""
    return [*(2**power for power in range(1, most.bit_length()) if 2**power < most), *([most] if most > 1 else [])]


def _with_method(config: RunConfig, method: Method) -> RunConfig:
    adapter = None if method == "full" else config.adapter or Adapter()
    kind = method if method in ("nf4", "int8", "fp8") else "none"
    model = config.model.model_copy(update={"quantization": kind})
    return config.model_copy(update={"adapter": adapter, "model": model})


def offer(request: Request, device: CatalogueDevice, method: Method, spread: Spread = SINGLE) -> Offer:
    """Returns what a method takes on so many of a device."""
    config, spec = request.config, request.spec
    nothing = Offer(device, method, config, None, None, request.work(1), None, None, "", spec, spread)
    try:
        config = request.with_method(method)
        nothing = replace(nothing, config=config)
        config = share(config, spread)
    except PlanError as error:
        return replace(nothing, why_not=" ".join(problem.what for problem in error.problems))
    except ValueError as error:
        return replace(nothing, why_not=f"{error}{_MORE if spread == SINGLE else ''}")
    if spread.strategy == "deepspeed" and spread.sharing > 1:
        return replace(nothing, why_not="rows are shared under ddp and fsdp2")
    if spread.strategy in ("fsdp2", "deepspeed") and not device.bf16 and device.vendor != "cpu":
        return replace(nothing, why_not=f"{spread.strategy} has no fp16, and the device has no bf16")
    nothing, found = replace(nothing, config=config), request.figures_of(device)
    try:
        statistics = request.statistics_of_part(spread.sharing)
        options = Options(statistics=statistics, spread=spread, rates=Rates(device, found), advise=False)
        choice = settle(config, spec, hardware_of(request, device), options)
    except PlanError as error:
        return replace(nothing, why_not=" ".join(problem.what for problem in error.problems))
    work = request.work(choice.best.rows)
    rows = replace(work.rows, tokens=work.rows.tokens / spread.sharing)
    step = speed.step(config, spec, choice.best, device, rows=rows, efficiencies=found)
    hours = None
    if work.steps is not None:
        hours = (work.steps * step.seconds + speed.start_seconds(spec, found)) / 3600
    usd = None if hours is None or device.price is None else hours * spread.num_processes * device.price.usd_per_hour
    return replace(nothing, choice=choice, work=work, step=step, hours=hours, usd=usd)


def hardware_of(request: Request, device: CatalogueDevice) -> Hardware:
    """Returns a machine with the device, and the host's memory beside it."""
    one = device.device()
    host = Device("cpu", "host", request.host_bytes)
    return Hardware((one,) if one.kind == "cpu" else (one, host), num_threads=request.num_threads or CORES)


def _why(best: Candidate, step: Step, spec: AnySpec) -> str:
    """One line: what the plan does, and what most of its time goes into."""
    parts = sorted(step.parts().items(), key=lambda item: -item[1])
    most = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in parts[:2])
    coarse = "; a coarser estimate (not native)" if isinstance(spec, BorrowedSpec) else ""
    return f"{best.ladder.words}; time: {most}{coarse}"
