"""What DeepSpeed's stage 3 must know of models whose layers run as one operation.

It gathers a module's own weights around its call. A layer here reads the weights of its submodules without calling
them, and a loss reads the head's: they are named to it as parameters that the layer, and the root, need as a whole.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def gather_whole_layers(engine: Any, layers: Sequence[nn.Module]) -> None:
    """Lets DeepSpeed gather all of a layer's weights around the layer's forward and around its backward.

    Its hooks on modules within the layers are taken off: the weights are there, and a forward that is run again in the
    backward would let them go too early. (DeepSpeed's own "leaf modules" take the gradients of a layer once that of
    its input is there; a first layer under frozen embeddings has none.)
    """
    from deepspeed.runtime.zero import register_external_parameter

    within: set[int] = set()
    for layer in layers:
        for parameter in layer.parameters():
            register_external_parameter(layer, parameter)
        for module in layer.modules():
            if module is not layer:
                within |= {id(module._forward_hooks), id(module._forward_pre_hooks)}
        if hasattr(layer, "recomputed"):
            _through_call(layer)
    offload = engine.optimizer.parameter_offload
    for handle in [*offload.forward_hooks, *offload.backward_hooks]:
        if id(handle.hooks_dict_ref()) in within:
            handle.remove()


def _through_call(layer: Any) -> None:
    """Lets `layer.recomputed`, which the decoder calls in place of the layer, run within the layer's hooks."""
    recomputed = layer.recomputed

    def run(*inputs: Any, **options: Any) -> Any:
        del layer.forward  # the layer's own again, which is what is run in the backward
        return recomputed(*inputs, **options)

    def call(*inputs: Any, **options: Any) -> Any:
        layer.forward = run
        return layer(*inputs, **options)

    layer.recomputed = call


def gather_for_logits(root: nn.Module, model: Any, heads: Sequence[nn.Parameter]) -> None:
    """Lets DeepSpeed gather the head's weights around the loss, and around `model.logits` in decoding."""
    from deepspeed.runtime.zero import GatheredParameters, register_external_parameter

    if not heads:
        return
    for head in heads:
        register_external_parameter(root, head)
    logits = model.logits

    def gathered_logits(hidden: Tensor) -> Tensor:
        with GatheredParameters(list(heads)):
            return logits(hidden)

    model.logits = gathered_logits
