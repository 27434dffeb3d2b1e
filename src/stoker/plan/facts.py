"""Facts of an architecture that plans ask for again and again, each computed once; never to be changed."""

from stoker.arch import activations, arithmetic
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
