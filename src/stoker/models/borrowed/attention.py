"""Our attention behind Transformers' attention interface, with packed documents kept apart.

Transformers calls a registered function with q, k and v of a layer. Which documents a row holds reaches it through a
context variable, because not every class passes its keyword arguments down. What it cannot compute it refuses with
`UnsupportedError`; the check on load then leaves the model its own attention.

Interface: https://huggingface.co/docs/transformers/attention_interface
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stoker.kernels.attention import attend_cached, attention

NAME = "stoker"
# Keyword arguments that change the result, and that are not computed here.
_CHANGES_THE_RESULT = ("position_bias", "head_mask", "sinks", "block_mask")

Documents = tuple[tuple[int, ...], ...]


class UnsupportedError(ValueError):
    """A class wants something of attention that this one does not compute."""


@dataclass
class Call:
    """A forward: the documents of each row (None: one document a row), the kernels, and the windows that layers had."""

    documents: Documents | None = None
    kernels: str = "reference"
    windows: list[int | None] = field(default_factory=list)


_call: ContextVar[Call | None] = ContextVar("stoker_attention_call", default=None)


def current_call() -> Call | None:
    """Returns the forward that is under way in this thread."""
    return _call.get()


@contextmanager
def calling(call: Call | None) -> Iterator[None]:
    """Makes `call` the forward under way."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def register() -> None:
    """Makes the function known to Transformers as "stoker"; without a mask function, so no T x T mask is made."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Returns (attended values [B, T, H, E], None) of q [B, H, T, E], k and v [B, K, S, E].

    `softcap` c: scores become c tanh(scores / c); `s_aux` [H]: Transformers' name of attention sinks.

    Raises UnsupportedError for masks, attention to later positions, and arguments that change the result otherwise.
    """
    call = current_call() or Call()
    wanted = [name for name in _CHANGES_THE_RESULT if others.get(name) is not None]
    if attention_mask is not None or is_causal is False or not getattr(module, "is_causal", True) or wanted:
        raise UnsupportedError(f"{type(module).__name__} wants {', '.join(wanted) or 'a mask of its own'}")
    call.windows.append(sliding_window)
    q, k, v = (_in_compute_type(x).transpose(1, 2) for x in (query, key, value))
    scores: dict[str, Any] = {"window": sliding_window, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    if key.shape[2] != query.shape[2]:
        return attend_cached(q, k, v, **scores), None
    if dropout > 0.0:
        is_windowed = sliding_window is not None and sliding_window < query.shape[2]
        if is_windowed or softcap is not None or s_aux is not None:
            raise UnsupportedError(f"{type(module).__name__} drops attention weights and changes scores besides")
        return _with_dropout(q, k, v, call.documents, scale=scaling, dropout=dropout), None
    return attention(q, k, v, document_lengths=call.documents, implementation=call.kernels, **scores), None


def _in_compute_type(x: Tensor) -> Tensor:
    """The tensor in autocast's dtype where that is on, which PyTorch's own attention sees to, but no other kernel."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, scale: float | None, dropout: float
) -> Tensor:
    """Causal attention, document by document, with weights dropped as PyTorch does it."""
    rows = documents or ((q.shape[1],),) * q.shape[0]
    lengths = [size for row in rows for size in row]
    parts = [x.flatten(0, 1).split(lengths) for x in (q, k, v)]
    outputs = [
        nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in document),
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )[0].transpose(0, 1)
        for document in zip(*parts, strict=True)
    ]
    return torch.cat(outputs).view(*q.shape[:3], v.shape[-1])
