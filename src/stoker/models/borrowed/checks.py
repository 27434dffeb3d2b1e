"""What a loaded model is asked before anything of it is replaced for good: the answers must stay the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stoker.errors import ModelError
from stoker.models.borrowed.answers import CUT, NUM_TOKENS, REFUSALS, agrees, probe_ids
from stoker.models.borrowed.attention import NAME, Call, register
from stoker.models.borrowed.find import takes_attention
from stoker.models.borrowed.head import fit
from stoker.models.borrowed.model import BorrowedModel
from stoker.models.borrowed.swaps import put_plain
from stoker.nn.linear import FusedLinear


@torch.no_grad()
def check(model: BorrowedModel) -> None:
    """Finds out what this instance can do, sets it up for that, and notes what it cannot; in evaluation mode.

    Raises ModelError for a model whose predictions depend on later tokens.
    """
    ids = probe_ids(model.vocab_size, model.device)
    if names := _leave_what_is_not_called(model, ids):
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        model.notices.append(f"{listed} cannot have an adapter, because the class reads their weights past the layer")
    expected = model.class_logits(ids)
    _refuse_what_looks_ahead(model, ids, expected)
    _set_up_head(model, ids)
    why = _why_not_our_attention(model, ids, expected)
    model.why_not_packed = why or _why_not_packed(model, ids)


def _leave_what_is_not_called(model: BorrowedModel, ids: Tensor) -> list[str]:
    """Makes plain layers again of those whose weight the class uses without calling them; returns their names.

    In training as well as in evaluation: some hand weights to fused kernels in one of the two. Layers of one name are
    looked at together: a few tokens do not pass every expert.
    """
    layers = {name: layer for name, layer in model.model.named_modules() if isinstance(layer, FusedLinear)}
    called = _called(model, ids, layers)
    was_training = model.training
    with torch.random.fork_rng([ids.device] if ids.is_cuda else []):  # dropout may draw
        called &= _called(model.train(), ids, layers)
    model.train(was_training)
    left = []
    for path, layer in layers.items():
        if called.isdisjoint(name.rpartition(".")[2] for name in layer.names):
            put_plain(model.model, path, layer, is_transposed=layer.names[0] in model.transposed)
            left.append(path)
    return left


def _called(model: BorrowedModel, ids: Tensor, layers: Mapping[str, FusedLinear]) -> set[str]:
    """Last names of the layers that a forward calls."""
    called: set[str] = set()

    def note(layer: FusedLinear, *_: Any) -> None:
        called.update(name.rpartition(".")[2] for name in layer.names)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        model.class_logits(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _refuse_what_looks_ahead(model: BorrowedModel, ids: Tensor, expected: Tensor) -> None:
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.vocab_size
    if not agrees(model.class_logits(changed)[:, :-1], expected[:, :-1]):
        raise ModelError(
            f"{type(model.model).__name__} lets predictions depend on later tokens, so it is no causal language model.",
            fix="Use a decoder; an encoder's config.json may need is_decoder: true.",
        )


def _set_up_head(model: BorrowedModel, ids: Tensor) -> None:
    try:
        found = fit(model.tap, lambda: model.class_logits(ids), model.config)
        if found is not None:
            model.run(ids)  # what the class does to logits must bear hidden states
    except REFUSALS:
        found = None
    model.head = found
    if found is None:
        name = type(model.model).__name__
        model.notices.append(f"{name} makes its logits in a way of its own, so they are held whole for the loss")


def _why_not_our_attention(model: BorrowedModel, ids: Tensor, expected: Tensor) -> str:
    """Gives the model our attention if its answers stay the same, and else says why not."""
    name, inner = type(model.model).__name__, model.model
    if not takes_attention(inner):
        return f"{name} computes attention, or what it has instead of it, by itself"
    own = model.config._attn_implementation
    register()
    _set_attention(inner, NAME)
    call = Call(kernels=model.kernels)
    why = ""
    try:
        if not agrees(model.class_logits(ids, call=call), expected):
            why = f"{name} gives other answers with attention from outside"
    except REFUSALS as error:
        why = f"{name} does not take attention from outside ({error})"
    if not why and not call.windows:
        why = f"{name} computes attention by itself"
    if not why and (windows := _unknown_windows(model.config, call)):
        why = f"{name} does not say where its window of {windows[0]} tokens applies"
    if why:
        _set_attention(inner, own)
    return why


def _set_attention(model: Any, name: str) -> None:
    model.set_attn_implementation(name)


def _unknown_windows(config: Any, call: Call) -> list[int]:
    """Windows of the configuration that no layer told our attention: the probe is too short to see what they do."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    if types is not None and set(types) <= {"full_attention"}:
        return []
    windows = [
        value
        for key, value in text.to_dict().items()
        # Of layers they count which have one ("sliding_window_pattern", "max_window_layers").
        if ("window" in key or "chunk" in key) and "pattern" not in key and "layers" not in key
        if type(value) is int and value > 0
    ]
    return [window for window in windows if window not in call.windows]


def _why_not_packed(model: BorrowedModel, ids: Tensor) -> str:
    """Lets packed rows run at once if documents stay apart, and else says why not."""
    if kind := _rope_by_length(model.config):
        return f"its {kind} rope depends on the length of the whole row"
    documents = ((CUT, NUM_TOKENS - CUT),)
    apart = torch.cat([model.run(part) for part in ids.split(list(documents[0]), dim=1)], dim=1)
    try:
        together = model.run(ids, call=Call(documents, model.kernels))
    except REFUSALS as error:
        return f"{type(model.model).__name__} does not take packed rows ({error})"
    model.packs = agrees(together, apart)
    return "" if model.packs else f"{type(model.model).__name__} does not keep packed documents apart"


def _rope_by_length(config: Any) -> str:
    """The type of a rope whose frequencies change with the length, which the probe is too short to see."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = (found.get("rope_type"), found.get("type")) if isinstance(found, dict) else ()
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), "")
