"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6).

    loss = E Σ_e f_e p_e        f_e = choices of expert e / rows        p_e = mean probability of expert e

over the rows of all layers together, as Transformers has it: each row counts its top_k most probable experts, so that
perfectly balanced choices give top_k. Plain torch: a few small products a layer, and no wait for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stoker.kernels.head_exchange import HeadExchange


def load_balancing_loss(
    logits: Sequence[Tensor], *, top_k: int, mask: Tensor | None = None, exchange: HeadExchange | None = None
) -> Tensor:
    """Returns the loss, an fp32 scalar, of routers' `logits` [N, E], one tensor a layer; gradients of the logits.

    mask: [N], 0 for rows that do not count (padding); None: all count, and where none does the loss is 0. `exchange`:
    of ranks that each have a part of the rows: all get the loss of all rows, and the gradient of the sum of what they
    make of it. Raises ValueError without any logits.
    """
    if not logits:
        raise ValueError("the load-balancing loss needs the logits of at least one router")
    num_experts, device = logits[0].shape[1], logits[0].device
    choices = torch.zeros(num_experts, device=device)
    probability: Tensor = torch.zeros(num_experts, device=device)
    counted = torch.ones(logits[0].shape[0], device=device) if mask is None else mask.to(device, torch.float32)
    for layer in logits:
        probabilities = torch.softmax(layer.float(), dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices
        # Whole numbers far below 2^24: exact in whatever order they are added.
        choices.scatter_add_(0, chosen.flatten(), counted.repeat_interleave(top_k))
        probability = probability + (probabilities * counted[:, None]).sum(0)
    rows = counted.sum() * len(logits)
    if exchange is not None:
        sums = exchange.sum(torch.cat((choices, probability, rows[None])))
        choices, probability, rows = sums[:num_experts].detach(), sums[num_experts:-1], sums[-1].detach()
    rows = rows.clamp(min=1.0)  # A rank that has only padding of a step has no loss, rather than 0 / 0.
    return num_experts * torch.dot(choices / rows, probability / rows)
