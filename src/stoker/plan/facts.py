"""Facts of an architecture that plans ask for again and again, each computed once; never to be changed."""

from stoker.arch import activations, arithmetic
from stoker.arch.borrowed import AnySpec
from stoker.arch.spec import LayerSpec
from stoker.plan.remember import remember

num_parameters = remember(0)(arithmetic.num_parameters)
linear_shapes = remember(0)(arithmetic.linear_shapes)
linears_by_name_only = remember(0)(arithmetic.linears_by_name_only)
expert_counts = remember(0)(arithmetic.expert_counts)
training_flops_per_token = remember(0)(arithmetic.training_flops_per_token)
recomputed_flops_per_token = remember(0)(activations.recomputed_flops_per_token)
adapter_flops_per_token = remember(0)(arithmetic.adapter_flops_per_token)
adapted_linears = remember(0)(arithmetic.adapted_linears)
adapter_parameters_by_linear = remember(0)(arithmetic.adapter_parameters_by_linear)
lora_parameters = remember(0)(arithmetic.lora_parameters)


def fused_sizes(spec: AnySpec, layer: LayerSpec) -> list[int]:
    """Values of a layer's weights, those of one input or of all experts kept as one."""
    return [linear.weights * max(1, linear.experts) for linear in arithmetic.linears(layer, spec.hidden_size).values()]


@remember(0)
def largest_layer(spec: AnySpec) -> int:
    """Values of the matrices of the largest layer."""
    return max((sum(fused_sizes(spec, layer)) for layer in set(spec.layers)), default=0)


@remember(0)
def layers_share(spec: AnySpec) -> float:
    """The share that the largest layer has of all layers' matrices."""
    # Most layers are one and the same object.
    objects = {id(layer): layer for layer in spec.layers}
    sizes = {identity: sum(fused_sizes(spec, layer)) for identity, layer in objects.items()}
    total = sum(sizes[id(layer)] for layer in spec.layers)
    return largest_layer(spec) / total if total else 1.0


@remember(0)
def table_values(spec: AnySpec) -> int:
    """Values of embedding and head, a tied one counted once."""
    count = (1 if getattr(spec, "tied_head", False) else 2) * spec.vocab_size * spec.hidden_size
    return min(count, num_parameters(spec))
