"""The formulas behind a survey's figures, with an offer's numbers in them."""

from stoker.plan import shared_rows, speed
from stoker.plan.gathered import passing
from stoker.plan.links import Links
from stoker.plan.memory import VALUE_BYTES, gathered_bytes, head_bytes
from stoker.plan.plan import size
from stoker.plan.states import bytes_each
from stoker.plan.survey import Offer, Request

CATEGORIES = (
    *("weights", "adapters", "gradients", "optimizer", "activations", "attention", "logits"),
    *("dequantisation", "transposed", "communication", "context", "fragmentation", "host", "disk", "time", "cost"),
)


def explain(request: Request, one: Offer, category: str) -> str:
    """Returns the formula of a category with its numbers, for an offer that fits."""
    others = {"host": _host, "disk": _disk, "time": _time, "cost": _cost}
    if category in others:
        return others[category](request, one)
    return f"{category} on {one.name}: {size(one.memory()[category])} = {_formulas(request, one)[category]}"


def _formulas(request: Request, one: Offer) -> dict[str, str]:
    """Returns how each category of the device's memory comes about."""
    plan, config, spec = one.plan, one.config, request.spec
    assert plan is not None
    trained, value = plan.num_trained_parameters, VALUE_BYTES[plan.precision]
    tokens = plan.micro_batch_size * plan.row_tokens
    held = plan.ladder.held(spec, one.micro)
    kept, passing = sum(layer.kept for layer in held), max((layer.passing for layer in held), default=0)
    return {
        "weights": f"{plan.num_parameters - (trained if config.adapter else 0):,} values, {plan.quantization}: linear "
        f"layers in that format, the rest {value} bytes each"
        + ("" if config.adapter else "; trained ones in their own type with copies to compute with"),
        "adapters": f"{trained:,} trained values x 4 bytes"
        + (f", with copies of {value} bytes to compute with" if value < 4 else ""),
        "gradients": f"one for each of {trained:,} trained values, in their type"
        + (f", over {one.spread.gradient_shards} devices" if one.spread.gradient_shards > 1 else ""),
        "optimizer": f"{config.train.optimizer.kind}: {bytes_each(config.train.optimizer, config.adapter):.3g} bytes "
        f"for each of {trained:,} fp32 values"
        + (f", over {one.spread.optimizer_shards} devices" if one.spread.optimizer_shards > 1 else ""),
        "activations": f"{tokens:,} tokens (micro-batch {plan.micro_batch_size} x {plan.row_tokens:,}) x {value} bytes "
        f"through {len(spec.layers)} layers that {plan.recompute}: {size(kept)} kept in all, {size(passing)} at most "
        "while a layer's backward runs; the highest moment of the backward, less attention's own",
        "attention": f"{tokens:,} tokens x 4 bytes x the queries' channels: its backward's gradient of q in fp32"
        if one.memory()["attention"]
        else f"nothing of its own: the feed-forward's backward holds more of the {tokens:,} tokens than attention's",
        "logits": _logits(one, head_bytes(spec, tokens, value), tokens, value, kept),
        "dequantisation": f"the largest weight once in {value} bytes a value"
        if plan.quantization != "none"
        else "none",
        "transposed": "a byte for each fp8 weight, transposed, and two for the head's in fp8, where memory is left"
        if plan.keep_transposed
        else "none",
        "communication": _communication(one),
        "context": "CUDA's context and cuBLAS' workspaces, or PyTorch's libraries on a CPU (rule of thumb)",
        "fragmentation": "5% of all else: freed blocks of odd sizes (rule of thumb)",
    }


def _host(request: Request, one: Offer) -> str:
    del request
    assert one.plan is not None
    here = min(one.spread.per_node, one.num_devices)
    return (
        f"host on {one.name}: {size(one.host_bytes)} = {here} x (a process with PyTorch and a shard being read, "
        f"4 GiB by rule of thumb, {size(one.plan.host_bytes)} in which kept tensors wait, and "
        f"{size(one.plan.memory.states_on_host)} of weights and optimiser states)"
    )


def _disk(request: Request, one: Offer) -> str:
    del request
    assert one.plan is not None
    config = one.config
    has_best = config.data.validation is not None and config.output.keep_best
    return (
        f"disk on {one.name}: {size(one.disk_bytes)} = {one.plan.num_trained_parameters:,} trained values x (4 + "
        f"{bytes_each(config.train.optimizer, config.adapter):.3g} bytes of optimiser state) x "
        f"({config.output.keep_last} = keep_last{' + the best' if has_best else ''}) + 4 bytes each that are saved at "
        "the end"
    )


def _time(request: Request, one: Offer) -> str:
    plan, step, device = one.plan, one.step, one.device
    assert plan is not None
    assert step is not None
    lines = [f"time on {one.name}: {step.seconds:.4g} s a step"]
    lines += [
        f"  {name:<12} {seconds:10.4g} s  {seconds / step.seconds:6.1%}"
        for name, seconds in step.parts().items()
        if seconds
    ]
    lines += [f"  hidden behind it: {name} {seconds:.4g} s" for name, seconds in step.hidden.items() if seconds]
    rate, found = device.rates.get(plan.precision, device.rates["fp32"]), request.figures_of(device)
    lines.append(
        f"  products at {found.matmul:.2f} x {rate / 1e12:,.0f} TFLOP/s, memory at {found.bandwidth:.2f} x "
        f"{device.bandwidth / 1e9:,.0f} GB/s; efficiencies: {found.source}"
    )
    return "\n".join(lines)


def _cost(request: Request, one: Offer) -> str:
    step, price = one.step, one.device.price
    assert step is not None
    if price is None or one.hours is None:
        return f"cost on {one.name}: not known ({'no price' if price is None else 'no number of steps'})"
    start = speed.start_seconds(request.spec, request.figures_of(one.device))
    count = f"{one.num_devices} x " if one.num_devices > 1 else ""
    return (
        f"cost on {one.name}: ({one.work.steps:,} steps x {step.seconds:.4g} s + {start:.0f} s to start) / 3600 x "
        f"{count}${price.usd_per_hour:.2f} an hour ({price.kind}, {price.date}) = ${one.usd:,.2f}"
    )


def _logits(one: Offer, head: int, tokens: int, value: int, kept: int) -> str:
    rows = 5 * tokens * one.spec.hidden_size * value
    held = (
        f"chunks of logits over {one.spec.vocab_size:,} words with their gradient, {size(head - rows)}, + 5 x "
        f"{tokens:,} x {one.spec.hidden_size:,} x {value} bytes of hidden states"
    )
    if one.config.adapter is None:
        return held
    return f"what of {size(head)} beside {size(kept)} that layers keep is above the peak of their backward; {held}"


def _communication(one: Offer) -> str:
    plan = one.plan
    if plan is None or one.spread.num_processes == 1:
        return "one device: none"
    spread = plan.spread
    sizes = speed.sizes_of(one.config, one.spec, plan)
    moved = passing(one.spec, spread, sizes)
    links, ranks = Links.of(one.device), spread.num_processes
    come = moved.per_step(plan.accumulation_steps, ranks)
    if spread.strategy == "fsdp2":
        held = (
            f"layers are gathered {'again for their backward' if plan.reshards else 'once a micro-batch'}; "
            f"{size(plan.memory.backward_buffers)} in a layer's backward alone, its weights and gradients that are on "
            "their way into parts; what else is gathered stays"
        )
    elif spread.weight_shards > 1:
        share = gathered_bytes(one.spec, sizes, sizes.trained_bytes) / (sizes.base + sizes.trained_bytes)
        held = f"{share:.1%} of the weights gathered at a time, with their gradients"
    else:
        held = "buckets of gradients" if spread.strategy == "deepspeed" else "gradients are summed where they lie"
    network = f", {links.network / 1e9:,.0f} GB/s into a node" if spread.nodes > 1 else ""
    if (sharing := spread.sharing) > 1:
        sent = shared_rows.sent_values(one.spec, plan.keep, sharing, is_fused=plan.layers == "fused")
        each = sent * plan.micro_batch_size * plan.row_tokens * sizes.value_bytes * (sharing - 1) / sharing
        network += f", and {each / 1e9:,.2f} GB with each micro-batch from those that share its rows"
    hidden = one.step.hidden.get("collectives", 0.0) if one.step else 0.0
    waits = one.step.communication if one.step else 0.0
    return (
        f"{held}, and NCCL's buffers (rule of thumb). {spread.name} over {ranks}: {come / 1e9:,.2f} GB come into a "
        f"device in a step at {links.device / 1e9:,.0f} GB/s{network}: {hidden:.3g} s beside the work, {waits:.3g} s "
        "not"
    )
