"""A causal language model of Transformers behind the interface that the rest of Stoker expects."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stoker.models.borrowed.answers import CUT, NUM_TOKENS, REFUSALS, agrees, probe_ids
from stoker.models.borrowed.attention import Call, Documents, calling, current_call
from stoker.models.borrowed.find import find_blocks, find_head
from stoker.models.borrowed.head import HeadFit, HeadTap

# What classes call the state that they decode from, in their outputs and arguments.
_STATES = ("cache", "past_key_values", "cache_params", "state")


@dataclass
class BorrowedCache:
    """What has been decoded: the class's own state by its name, or the ids themselves where there is none to use."""

    length: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    ids: Tensor | None = None


class BorrowedModel(nn.Module):
    """An instance `model` of a class of Transformers whose output layer hands on hidden states.

    Its parameters keep their names below `model.`. `head_weight` is None for a class whose logits are no scaled or
    capped linear function of the hidden states: then `forward` returns the logits themselves, and `logits` nothing
    else. `packs`: packed rows run at once; otherwise (`why_not_packed`) one document after the other. `caches`: the
    class decodes from its own state (None: not looked at yet); otherwise each token runs the whole text again.
    """

    def __init__(self, model: nn.Module, *, kernels: str = "reference") -> None:
        super().__init__()
        self.model = model
        self.kernels = kernels
        self.packs = False
        self.caches: bool | None = None
        self.transposed: frozenset[str] = frozenset()
        self.notices: list[str] = []
        self.why_not_packed = ""
        path, head = find_head(model)
        parent, _, name = path.rpartition(".")
        tap = HeadTap(head)
        setattr(model.get_submodule(parent), name, tap)
        # In tuples, because the module that owns them has registered them already.
        self._tap = (tap,)
        self._blocks = (find_blocks(model)[1],)
        self._head: HeadFit | None = HeadFit()
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        for block in self.blocks:
            _let_recompute(block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves everything; what follows from the configuration, as rotary frequencies do, keeps its exact values."""
        derived = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, before in derived:
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def tap(self) -> HeadTap:
        """The output layer."""
        return self._tap[0]

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers; each runs again in the backward where its `recompute` is set."""
        return self._blocks[0]

    @property
    def config(self) -> Any:
        """Transformers' configuration."""
        return cast("Any", self.model).config

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.tap.out_features

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tap.weight.device

    @property
    def head(self) -> HeadFit | None:
        """How logits follow from hidden states; None: only the class knows."""
        return self._head

    @head.setter
    def head(self, fit: HeadFit | None) -> None:
        self._head = fit
        self.tap.computes = fit is None

    @property
    def head_weight(self) -> Tensor | None:
        """[V, D], or None where `forward` returns logits."""
        return None if self.head is None else self.tap.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        return None if self.head is None else self.tap.bias

    @property
    def logit_scale(self) -> float:
        """What the output layer's logits are multiplied by."""
        return 1.0 if self.head is None else self.head.scale

    @property
    def logit_softcap(self) -> float | None:
        """The cap c of c tanh(logits / c), or None."""
        return None if self.head is None else self.head.softcap

    @property
    def takes_positions(self) -> bool:
        """Whether the class can be told where documents begin."""
        return "position_ids" in self._arguments

    def forward(
        self, input_ids: Tensor, *, document_lengths: Documents | None = None, cache: BorrowedCache | None = None
    ) -> Tensor:
        """Returns the hidden states that the output layer reads, [B, T, D], of `input_ids` [B, T].

        `document_lengths`: per row the lengths of its documents, which sum to T and never see one another. `cache`: the
        ids continue the ones it holds. Where `head_weight` is None, logits [B, T, V] instead.
        """
        if cache is not None:
            return self._decode(input_ids, cache)
        if document_lengths is None or all(len(row) == 1 for row in document_lengths):
            return self.run(input_ids)
        if self.packs:
            return self.run(input_ids, call=Call(document_lengths, self.kernels))
        return torch.stack(
            [
                torch.cat([self.run(document[None])[0] for document in ids.split(list(lengths))])
                for ids, lengths in zip(input_ids, document_lengths, strict=True)
            ]
        )

    def run(self, input_ids: Tensor, *, call: Call | None = None) -> Tensor:
        """One forward of the class, without a cache; `call` says which documents the rows hold."""
        call = call or Call(kernels=self.kernels)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._arguments else {}
        if call.documents is not None and self.takes_positions:
            options["position_ids"] = _positions(call.documents, input_ids.device)
        with calling(call):
            output = self.model(input_ids=input_ids, **options)
        return self._result(output)

    def class_logits(self, input_ids: Tensor, *, call: Call | None = None) -> Tensor:
        """The class's own logits [B, T, V], whatever it does to get them."""
        computed = self.tap.computes
        self.tap.computes = True
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._arguments else {}
        try:
            with calling(call or Call(kernels=self.kernels)):
                return _logits_of(self.model(input_ids=input_ids, **options))
        finally:
            self.tap.computes = computed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, of what `forward` returns."""
        if self.head is None:
            return hidden
        scores = nn.functional.linear(hidden, self.tap.weight, self.tap.bias) * self.head.scale
        cap = self.head.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def new_cache(self, *, capacity: int, batch_size: int = 1) -> BorrowedCache:
        """An empty cache; whether the class's own state can be used is found out at the first."""
        del capacity, batch_size  # the class's state grows as it needs
        if self.caches is None:
            self.caches = self._decodes_from_its_state()
        return BorrowedCache()

    @torch.no_grad()
    def _decodes_from_its_state(self) -> bool:
        """Whether decoding step by step from the class's own state gives what one forward gives."""
        was_training = self.training
        self.eval()
        ids = probe_ids(self.vocab_size, self.device)
        expected = self.run(ids)
        try:
            self.caches, cache = True, BorrowedCache()
            steps = ids.split([CUT, *[1] * (NUM_TOKENS - CUT)], dim=1)
            return agrees(torch.cat([self(step, cache=cache) for step in steps], dim=1), expected)
        except REFUSALS:
            return False
        finally:
            self.caches = None
            self.train(was_training)

    def _decode(self, input_ids: Tensor, cache: BorrowedCache) -> Tensor:
        cache.length += input_ids.shape[1]
        if self.caches is not False:
            with calling(Call(kernels=self.kernels)):
                output = self.model(input_ids=input_ids, use_cache=True, **cache.state)
            cache.state = {
                name: state
                for name in _STATES
                if name in self._arguments and (state := getattr(output, name, None)) is not None
            }
            return self._result(output)
        cache.ids = input_ids if cache.ids is None else torch.cat((cache.ids, input_ids), dim=1)
        return self.run(cache.ids)[:, -input_ids.shape[1] :]

    def _result(self, output: Any) -> Tensor:
        hidden, self.tap.seen = self.tap.seen, None
        if self.head is None:
            return _logits_of(output)
        assert hidden is not None
        return hidden


def _logits_of(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _positions(documents: Documents, device: torch.device) -> Tensor:
    """[B, T] of int64: every document's positions from 0 on."""
    rows = [torch.cat([torch.arange(length) for length in row]) for row in documents]
    return torch.stack(rows).to(device)


def _let_recompute(block: nn.Module) -> None:
    """Lets the block run again in the backward where its `recompute` is set, on this instance alone."""
    run = block.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        if not (block.recompute and torch.is_grad_enabled()):
            return run(*inputs, **options)
        call = current_call()  # the backward comes after the forward that it belongs to

        def run_again(*inputs: Any, **options: Any) -> Any:
            with calling(call):
                return run(*inputs, **options)

        return checkpoint(run_again, *inputs, use_reentrant=False, **options)

    block.recompute = False  # type: ignore[assignment]
    block.forward = forward
