"""The next token from the logits of the last position: greedy, or drawn after temperature, top-k and top-p.

Steps and their order are those of Transformers' `generate`, so that the same settings mean the same distribution.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0: the likeliest token, and `top_k` and `top_p` have no part in it.

    `top_k` keeps the k likeliest tokens, `top_p` the fewest whose probabilities reach p; `repetition_penalty` (Keskar
    et al. 2019, arXiv:1909.05858) divides positive and multiplies negative logits of the tokens seen so far.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} is negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} is not positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} is not in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty} is not positive")


def next_token(logits: Tensor, sampling: Sampling, *, seen: Collection[int], generator: torch.Generator) -> int:
    """Returns the token chosen from `logits` `[V]`, given the ids `seen` so far; draws from `generator`, on the CPU."""
    logits = logits.float().cpu()
    if sampling.repetition_penalty != 1.0:
        logits = _penalized(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the distribution `[V]` over tokens after temperature, top-k and top-p; `temperature` must be positive."""
    # Less the largest first: a very small temperature must not overflow.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p is None or sampling.top_p == 1.0:
        return probs
    ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the likeliest has nothing before it and always stays
    probs = probs.index_fill(-1, order[beyond], 0.0)
    return probs / probs.sum()


def _penalized(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty))
