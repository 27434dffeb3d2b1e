"""What a run does when memory runs out with a micro-batch that cannot be smaller: its layers keep less."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from stoker.config.schema import RunConfig
from stoker.plan.ladder import lower, words
from stoker.plan.plan import Plan

if TYPE_CHECKING:
    from stoker.kernels.offload import HostOffload
    from stoker.models.open import Model


class Layers:
    """A model's layers as they run now, which `relieve` puts on the plan's next rung.

    `decoder` is changed in place; its parameters stay the same objects, so that gradients and the optimiser's state go
    on. What a rung computes again has the same values: the loss stays what it was.
    """

    def __init__(self, decoder: "Model", plan: Plan) -> None:
        self._decoder, self.plan = decoder, plan
        self._offload: HostOffload | None = None
        self._set_up()

    def clear(self) -> None:
        """Lets go of what waits on the host."""
        if self._offload is not None:
            self._offload.clear()

    def relieve(self) -> str:
        """Puts every layer on the next rung and returns a sentence that says so, "" where there is none."""
        ladder = lower(self.plan.ladder, can_offload=self.plan.device == "cuda")
        if ladder is None:
            return ""
        before = self.plan.recompute
        self.plan = replace(
            self.plan,
            keep=ladder.keep,
            offload_activations=ladder.offload,
            tile_tokens=ladder.tile_tokens,
            staying_layers=ladder.staying,
        )
        self.clear()
        self._set_up()
        host = ", on the host" if ladder.offload else ""
        return (
            f"Memory ran out with a single document: layers {words(ladder.keep)}{host} from here on, instead of "
            f"{before}. Loss and gradients are unchanged; what they no longer keep is computed again."
        )

    def _set_up(self) -> None:
        from stoker.compose.execution import set_up_layers

        self._offload = set_up_layers(self._decoder, self.plan)


def relief(config: RunConfig, layers: Layers) -> Callable[[], str]:
    """Returns what to call when a single document is too much: it does nothing where the user or processes decide."""
    if config.engine.recompute != "auto" or layers.plan.strategy != "single":
        return lambda: ""
    return layers.relieve
