"""What a device holds through one step: at its start, forward layer by layer, the loss, backward, the update.

The sums that `memory.estimate` and `activations.peak` make, in the order of time; gradients grow through the first
micro-batch's backward, and what they take is there from then on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stoker.plan.memory import head_bytes
from stoker.plan.survey import Offer

PHASES = ("load", "forward", "loss", "backward", "optimizer")
# Layers that are shown of each pass.
_SHOWN_LAYERS = 12


@dataclass(frozen=True)
class Moment:
    """A time in a step and the bytes that each category holds then."""

    phase: str
    label: str
    bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.bytes.values())


def timeline(one: Offer) -> list[Moment]:
    """Returns the moments of a step of an offer that fits, in their order; none holds more than the plan's peak."""
    return list(_moments(one))


def _moments(one: Offer) -> Iterator[Moment]:
    plan = one.plan
    assert plan is not None
    peak = one.memory()
    held = plan.ladder.held(one.spec, one.micro)
    depth = len(held)
    shown = sorted({round(index * (depth - 1) / max(1, _SHOWN_LAYERS - 1)) for index in range(_SHOWN_LAYERS)})
    workspace = peak["attention"]
    resting = {name: peak[name] for name in ("weights", "adapters", "optimizer", "transposed", "context")}
    at_work = resting | {name: peak[name] for name in ("dequantisation", "communication")}

    def moment(phase: str, label: str, **more: int) -> Moment:
        parts = (resting if phase in ("load", "optimizer") else at_work) | more
        lost = round(peak["fragmentation"] * sum(parts.values()) / max(1, sum(peak.values()) - peak["fragmentation"]))
        return Moment(phase, label, {name: parts.get(name, 0) for name in peak} | {"fragmentation": lost})

    yield moment("load", "weights and optimiser")
    kept = [0]
    for layer in held:
        kept.append(kept[-1] + layer.kept)
    for index in shown:
        yield moment("forward", f"layer {index + 1}", activations=kept[index + 1])
    head = head_bytes(one.spec, one.micro.tokens, one.micro.value_bytes)
    room = plan.memory.total - moment("loss", "", activations=kept[depth]).total
    yield moment("loss", "head and loss", activations=kept[depth], logits=max(0, min(head, round(room / 1.06))))
    for index in reversed(shown):
        done = (depth - index) / depth
        yield moment(
            "backward",
            f"layer {index + 1}",
            activations=kept[index + 1] + held[index].passing - workspace,
            attention=workspace,
            logits=peak["logits"],
            gradients=round(done * peak["gradients"]),
        )
    yield moment("optimizer", "update", gradients=peak["gradients"])
