"""Decoding token by token with a key/value cache."""

from collections.abc import Collection, Iterator, Sequence

import torch

from stoker.generate.sample import Sampling, next_token
from stoker.nn.language_model import LanguageModel


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Returns an iterator over the tokens that `model` puts after `prompt_ids`, each as soon as it is known.

    It ends before a token of `stop_ids`, or after `max_new_tokens`. The settings of sampling are those of `Sampling`;
    with a `seed` the same tokens come again, on any device that gives the same logits, and torch's own generators are
    left alone. The model is in evaluation mode until the iterator ends or is closed. Raises ValueError for an empty
    prompt, ids outside the vocabulary, and settings without meaning.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token, such as the beginning-of-text token")
    outside = [token for token in prompt_ids if not 0 <= token < model.vocab_size]
    if outside:
        raise ValueError(f"prompt id {outside[0]} is outside the vocabulary of {model.vocab_size}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens} is negative")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return _decode(model, list(prompt_ids), max_new_tokens, sampling, stop_ids=frozenset(stop_ids), generator=generator)


@torch.no_grad()
def _decode(
    model: LanguageModel,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int],
    generator: torch.Generator,
) -> Iterator[int]:
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # The last token is never fed back, so its keys need no room.
    cache = model.new_cache(capacity=len(ids) + max(0, max_new_tokens - 1))
    fresh, seen = ids, set(ids)
    try:
        for _ in range(max_new_tokens):
            hidden = model(torch.tensor([fresh], device=device), cache=cache)
            token = next_token(model.logits(hidden[0, -1]), sampling, seen=seen, generator=generator)
            if token in stop_ids:
                return
            yield token
            fresh = [token]
            seen.add(token)
    finally:
        model.train(was_training)
